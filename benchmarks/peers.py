"""Models of the zoo beside the same models in PyTorch, for `benchmarks/models.py`.

A peer says how its PyTorch module is made, what both take, and what they are trained with. The
modules are those of timm, transformers and torchvision where these have the model, else those of
`references.py`. Nothing imports torch before a module is made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.tasks import Classification, Forecasting, LanguageModelling
from zoo.tasks.task import Task

Batch = dict[str, np.ndarray]

# --------------------------------------------------------------------------- inputs and losses


@dataclass(frozen=True)
class Kind:
    """What models of a kind take, and how wrong an output is.

    Attributes:
      make: `(example inputs of the model, classes, random numbers) -> batch`, as the zoo's tasks
        take it.
      task: the zoo's.
      loss: of the zoo's output and a batch.
      torch_loss: the same of PyTorch's.
    """

    make: Callable[[Mapping[str, jax.ShapeDtypeStruct], int, np.random.Generator], Batch]
    task: Task
    loss: Callable[[Any, Mapping[str, Any]], Any]
    torch_loss: Callable[[Any, Mapping[str, Any]], Any]


def _pixels(shapes: Mapping[str, Any], classes: int, rng: np.random.Generator) -> Batch:
    (images,) = shapes.items()
    rows = images[1].shape[0]
    values = rng.standard_normal(images[1].shape).astype("float32")
    return {images[0]: values, "labels": rng.integers(0, classes, rows).astype("int32")}


def _words(shapes: Mapping[str, Any], classes: int, rng: np.random.Generator) -> Batch:
    return {"tokens": rng.integers(0, classes, shapes["tokens"].shape).astype("int32")}


def _texts(shapes: Mapping[str, Any], classes: int, rng: np.random.Generator) -> Batch:
    words = _words(shapes, 30522, rng)
    return words | {"labels": rng.integers(0, classes, len(words["tokens"])).astype("int32")}


def _windows(shapes: Mapping[str, Any], horizon: int, rng: np.random.Generator) -> Batch:
    rows, _, variates = shapes["series"].shape
    sizes = {name: shape.shape for name, shape in shapes.items()}
    sizes["target"] = (rows, horizon, variates)
    return {name: rng.standard_normal(size).astype("float32") for name, size in sizes.items()}


def _class_loss(logits: Any, batch: Mapping[str, Any]) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def _torch_class_loss(logits: Any, batch: Mapping[str, Any]) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch["labels"])


def _next_token_loss(logits: Any, batch: Mapping[str, Any]) -> Any:
    logits, labels = logits[:, :-1], batch["tokens"][:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _torch_next_token_loss(logits: Any, batch: Mapping[str, Any]) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())


def _squared_error(forecast: Any, batch: Mapping[str, Any]) -> Any:
    return ((forecast - batch["target"]) ** 2).mean()


PIXELS = Kind(_pixels, Classification(), _class_loss, _torch_class_loss)
TEXTS = Kind(_texts, Classification(), _class_loss, _torch_class_loss)
WORDS = Kind(_words, LanguageModelling(), _next_token_loss, _torch_next_token_loss)
SERIES = Kind(_windows, Forecasting(), _squared_error, _squared_error)


def for_torch(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch as PyTorch takes it: channels of images first, integers of 64 bits."""
    import torch

    tensors = {}
    for name, value in batch.items():
        value = np.moveaxis(value, -1, 1) if value.ndim > 3 else value
        value = value.astype("int64") if value.dtype == np.int32 else value
        tensors[name] = torch.from_numpy(value.copy())
    return tensors


# ---------------------------------------------------------------------------- PyTorch modules


def _timm(name: str) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=model.num_classes)

    return make


def _bert(model: nn.Module) -> Any:
    import transformers

    config = transformers.BertConfig(num_labels=model.num_classes, attn_implementation="sdpa")
    return transformers.BertForSequenceClassification(config)


def _gpt2(model: nn.Module) -> Any:
    import transformers

    config = transformers.GPT2Config(attn_implementation="sdpa", use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def _mamba2(model: nn.Module) -> Any:
    import transformers

    config = transformers.Mamba2Config(
        vocab_size=model.vocab_size, hidden_size=model.embed_dim, num_hidden_layers=model.depth,
        num_heads=int(model.expand * model.embed_dim) // model.head_dim, head_dim=model.head_dim,
        state_size=model.state_size, n_groups=model.groups, chunk_size=64, use_cache=False,
        tie_word_embeddings=model.tie_embeddings,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def _video_swin(model: nn.Module) -> Any:
    from torchvision.models import video

    return video.swin3d_t()


def _chosen(reference: str, *names: str) -> Callable[[nn.Module], Any]:
    """A class of `references.py`, its arguments from fields of the zoo's model."""

    def make(model: nn.Module) -> Any:
        import references

        return getattr(references, reference)(**{name: getattr(model, name) for name in names})

    return make


_DECODED = (
    "label_length", "horizon", "variates", "time_features", "embed_dim", "depth", "decoder_depth",
    "num_heads", "mlp_dim", "factor",
)  # fmt: skip


def _informer(model: nn.Module) -> Any:
    """With the keys that the zoo's model samples where it has no random numbers."""
    import references
    import torch

    from zoo.models.timeseries.informer import kept

    lengths = [model.context_length // 2**i for i in range(model.depth)]
    lengths += [model.label_length + model.horizon] * model.decoder_depth
    samples = []
    for i, length in enumerate(lengths):
        key, shape = jax.random.fold_in(jax.random.key(0), i), (length, kept(length, model.factor))
        drawn = np.asarray(jax.random.randint(key, shape, 0, length))
        samples.append(torch.from_numpy(drawn.astype("int64")))
    fields = {name: getattr(model, name) for name in _DECODED}
    return references.Informer(samples=samples, **fields)


def _language_model(mixer: str) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        import references

        from zoo.layers.decoder import multiple_of_256

        return references.LanguageModel(
            model.vocab_size, model.embed_dim, model.depth,
            model.mlp_dim or multiple_of_256(model.embed_dim),
            lambda: getattr(references, mixer)(model.embed_dim, model.num_heads),
        )  # fmt: skip

    return make


def _logits_of(module: Any, tokens: Any) -> Any:
    return module(input_ids=tokens).logits


def _plain(module: Any, *inputs: Any) -> Any:
    return module(*inputs)


# ------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Peer:
    """A variant of the zoo and its PyTorch module.

    Attributes:
      of: where the module is from.
      kind: what both take.
      make: the module for a model of the zoo.
      batch: examples, if not told otherwise.
      fields: that replace the variant's.
      length: tokens of a text.
      call: the module and its inputs to the output.
    """

    of: str
    kind: Kind
    make: Callable[[nn.Module], Any]
    batch: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    length: int = 128
    call: Callable[..., Any] = _plain

    def create(self, name: str) -> nn.Module:
        """The zoo's model."""
        import zoo

        return zoo.create(name, **self.fields)

    def data(self, model: nn.Module, rows: int) -> Batch:
        """A batch of random numbers, always the same."""
        sizes = {"length": self.length} if self.kind in (TEXTS, WORDS) else {}
        shapes = model.example_inputs(rows, **sizes)
        names = ("num_classes", "vocab_size") if self.kind is not SERIES else ("horizon",)
        count = next(getattr(model, name) for name in names if getattr(model, name, 0))
        return self.kind.make(shapes, count, np.random.default_rng(0))

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Any]:
        """What of a batch both are called with, in order."""
        return [batch[name] for name in model.example_inputs(1) if name in batch]


_SMALL = {"vocab_size": 8192, "embed_dim": 512, "depth": 6}

PEERS: dict[str, Peer] = {
    "vit_small_patch16_224": Peer("timm", PIXELS, _timm("vit_small_patch16_224"), 8),
    "swin_tiny_patch4_window7_224": Peer("timm", PIXELS, _timm("swin_tiny_patch4_window7_224"), 8),
    "CSWin_64_12211_tiny_224": Peer("references.py", PIXELS, _chosen("CSWin"), 4),
    "swin_tiny_patch244_window877_kinetics400_1k": Peer(
        "torchvision", PIXELS, _video_swin, 1, {"clip_size": (16, 112, 112)}
    ),
    "bert_base_uncased_classification": Peer(
        "transformers", TEXTS, _bert, 4, {"num_classes": 2}, call=_logits_of
    ),
    "gpt2": Peer("transformers", WORDS, _gpt2, 2, call=_logits_of),
    "patchtst_weather_96_96": Peer(
        "references.py", SERIES,
        _chosen("PatchTST", "context_length", "horizon", "patch_length", "stride", "embed_dim",
                "depth", "num_heads", "mlp_dim"),
        16,
    ),
    "itransformer_ecl_96_96": Peer(
        "references.py", SERIES,
        _chosen("ITransformer", "context_length", "horizon", "embed_dim", "depth", "num_heads",
                "mlp_dim"),
        8,
    ),
    "informer_etth1_96_96": Peer("references.py", SERIES, _informer, 16),
    "autoformer_ettm1_96_96": Peer(
        "references.py", SERIES, _chosen("Autoformer", *_DECODED, "moving_average"), 16
    ),
    "gla_340m": Peer(
        "references.py", WORDS, _language_model("GatedLinearAttention"), 2, _SMALL, 512
    ),
    "deltanet_340m": Peer(
        "references.py", WORDS, _language_model("DeltaRule"), 2, _SMALL | {"num_heads": 4}, 512
    ),
    "mamba2_130m": Peer("transformers", WORDS, _mamba2, 1, {"depth": 12}, 256, _logits_of),
}  # fmt: skip
"""Variant -> its peer."""


def zoo_loss(peer: Peer, model: nn.Module) -> Callable[[Any, Any, Mapping[str, Any]], Any]:
    """`(params, other collections, batch) -> loss`, without dropout."""

    def loss(params: Any, others: Any, batch: Mapping[str, Any]) -> Any:
        output = model.apply({"params": params, **others}, *peer.inputs(model, batch))
        return peer.kind.loss(output.astype(jnp.float32), batch)

    return loss
