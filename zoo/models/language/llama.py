"""LLaMA: the decoder that most open language models are; LLaMA 1 to 3, Mistral, and small ones.

Touvron et al., arXiv 2302.13971 and 2307.09288; Dubey et al., "The Llama 3 Herd of Models",
arXiv 2407.21783; Jiang et al., "Mistral 7B", arXiv 2310.06825. Official code
github.com/meta-llama/llama (Llama 2 Community License) and github.com/huggingface/transformers
(Apache-2.0), whose names we follow. The weights have licences of their own.

    x = x + W_o attention(R q, R k, v),   q, k, v = W x',  x' = RMSNorm(x)
    x = x + W_down (silu(W_gate x') * W_up x'),            x' = RMSNorm(x)
    logits = W RMSNorm(x)                                  W is the embedding in the smallest

R turns channel i of the first half of a head with channel i of the second half, by the token's
position; Meta's own files turn neighbouring channels, so their rows are in another order. Several
query heads share a key head. `mask` hides padding; positions are 0, 1, ... with it, too, unless
they are given, which changes nothing but rounding, for only distances matter.

    features            stories15m
    embed               128  288    for 128 tokens
    layer0              128  288    up to layer5
    last_hidden_state   128  288    behind the last RMSNorm
    logits              128  32000
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from zoo.checkpoints.rules import Rule, Rules, Transform, chain, elementwise, linear, tied
from zoo.layers import rotary
from zoo.layers.causal import RotaryAttention
from zoo.layers.decoder import CausalLM
from zoo.layers.mlp import ACTIVATIONS
from zoo.system import File, System, Variant


class Llama(CausalLM):
    """LLaMA language model; states and steps are those of `zoo.layers.decoder.CausalLM`.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads; None: as many.
      head_dim: channels of a head; None: the channels over the heads.
      window: tokens that a query sees, itself included (Mistral); None: all.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched, one of `zoo.layers.rotary`, or None.
      qkv_bias: whether query, key and value have biases (Qwen 2).
      out_bias: whether the map behind attention has one.
      mlp_bias: whether the MLP has biases.
      activation: of the MLP, a key of `zoo.layers.mlp.ACTIVATIONS`.
    """

    embed_dim: int = 4096
    depth: int = 32
    mlp_dim: int | None = 11008
    epsilon: float = 1e-5
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: Callable | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"

    def mixers(self) -> list[nn.Module]:
        """Rotary attention in every layer."""
        return [self.attention()] * self.depth

    def attention(self) -> RotaryAttention:
        """The attention of a layer, unbound."""
        return RotaryAttention(
            self.num_heads,
            self.num_kv_heads,
            self.window,
            self.rope_theta,
            self.qkv_bias,
            self.dtype,
            self.param_dtype,
            self.head_dim,
            self.rope_scaling,
            self.out_bias,
            parent=None,
        )

    def block(self) -> Callable[..., nn.Module]:
        """Makes a block of a mixer and a name."""
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation={self.activation!r} is none of {known}.")
        options = {"activation": ACTIVATIONS[self.activation], "mlp_bias": self.mlp_bias}
        return super().block(**options)

    def init_state(self, batch: int, length: int) -> dict[str, Any]:
        """The state before the first token; `length` is the most that attention will see.

        Raises:
          ValueError: if the rotary frequencies would change on the way (`rotary.Dynamic`).
        """
        scaling = self.rope_scaling
        if isinstance(scaling, rotary.Dynamic) and length > scaling.max_positions:
            raise ValueError(
                f"rotary.Dynamic turns all keys anew beyond {scaling.max_positions} positions, "
                f"which steps of {length} tokens cannot; call the model on whole texts, or use "
                "rotary.Linear or rotary.Yarn."
            )
        return super().init_state(batch, length)


# ---------------------------------------------------------------------------- checkpoints


def _to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of neighbouring channels that turn together, as two halves of a head."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def _to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_to_halves`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def _halves(name: str) -> Callable[[Llama], Transform]:
    """The transform of Meta's rows of `query` or `key`, a function of the model."""

    def transform(model: Llama) -> Transform:
        heads = model.num_heads if name == "query" else model.num_kv_heads or model.num_heads
        return elementwise(lambda x: _to_halves(x, heads), lambda x: _to_pairs(x, heads))

    return transform


def _head(table: str, head: str, tie: bool) -> list[Rule]:
    """Rules of embedding and head; `tie`: the file has the same matrix under both names."""
    both = [Rule((table, head), "embed/embedding", tied)] if tie else []
    return [Rule(head, "head/kernel", linear), *both, Rule(table, "embed/embedding")]


def _huggingface(prefix: str = "model.", *, tie: bool = False) -> Rules:
    theirs, ours = f"{prefix}layers.{{i}}", "layers_{i}"
    rules = _head(f"{prefix}embed_tokens.weight", "lm_head.weight", tie)
    for a, b in zip("qkvo", ("query", "key", "value", "out"), strict=True):
        a, b = f"{theirs}.self_attn.{a}_proj", f"{ours}/attention/{b}"
        rules += [Rule(f"{a}.weight", f"{b}/kernel", linear), Rule(f"{a}.bias", f"{b}/bias")]
    for name in ("gate", "up", "down"):
        a, b = f"{theirs}.mlp.{name}_proj", f"{ours}/mlp/{name}"
        rules += [Rule(f"{a}.weight", f"{b}/kernel", linear), Rule(f"{a}.bias", f"{b}/bias")]
    rules += [
        Rule(f"{theirs}.input_layernorm.weight", f"{ours}/norm1/scale"),
        Rule(f"{theirs}.post_attention_layernorm.weight", f"{ours}/norm2/scale"),
        Rule(f"{prefix}norm.weight", "norm/scale"),
        Rule("score.weight", "class_head/kernel", linear),
    ]
    derived = {f"{theirs}.self_attn.rotary_emb.inv_freq": None, "model.rotary_emb.inv_freq": None}
    fresh = ("head/kernel", "class_head/kernel")
    return Rules(rules, derived=derived, unused=("score.weight",), fresh=fresh)


def _meta(*, tie: bool = False) -> Rules:
    theirs, ours = "layers.{i}", "layers_{i}"
    rules = _head("tok_embeddings.weight", "output.weight", tie)
    for a, b in zip("qkvo", ("query", "key", "value", "out"), strict=True):
        a, b = f"{theirs}.attention.w{a}", f"{ours}/attention/{b}"
        kernel, bias = f"{b}/kernel", f"{b}/bias"
        if a[-1] in "vo":
            rules += [Rule(f"{a}.weight", kernel, linear), Rule(f"{a}.bias", bias)]
            continue
        name = b.split("/")[-1]
        turned = _halves(name)
        rules.append(
            Rule(f"{a}.weight", kernel, lambda model, turned=turned: chain(turned(model), linear))
        )
        rules.append(Rule(f"{a}.bias", bias, turned))
    for a, b in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        a, b = f"{theirs}.feed_forward.{a}", f"{ours}/mlp/{b}"
        rules += [Rule(f"{a}.weight", f"{b}/kernel", linear), Rule(f"{a}.bias", f"{b}/bias")]
    rules += [
        Rule(f"{theirs}.attention_norm.weight", f"{ours}/norm1/scale"),
        Rule(f"{theirs}.ffn_norm.weight", f"{ours}/norm2/scale"),
        Rule("norm.weight", "norm/scale"),
    ]
    derived = dict.fromkeys(("rope.freqs", "freqs_cos", "freqs_sin"))
    return Rules(rules, derived=derived, fresh=("head/kernel",))


LAYOUTS = {
    "huggingface": _huggingface(),
    "huggingface_tied": _huggingface(tie=True),
    "meta": _meta(),
    "meta_tied": _meta(tie=True),
    "trunk": _huggingface(""),
}

_COMMON = dict(
    module=Llama,
    task="language_modelling",
    paper="LLaMA, arXiv 2302.13971",
    code="github.com/meta-llama/llama",
    files=(File("model.safetensors"), File("consolidated.00.pth")),
)
_LLAMA1 = _COMMON | dict(licence="LLaMA non-commercial licence")
_LLAMA2 = _COMMON | dict(
    paper="Llama 2, arXiv 2307.09288", licence="Llama 2 Community License",
)  # fmt: skip
_LLAMA3 = _COMMON | dict(
    paper="The Llama 3 Herd of Models, arXiv 2407.21783", code="github.com/meta-llama/llama3",
    licence="Llama 3 Community License",
)  # fmt: skip
_STORIES = _COMMON | dict(
    paper="llama2.c", code="github.com/karpathy/llama2.c", licence="MIT",
    files=(File("stories15M.pt"),), metric="trained on TinyStories",
)  # fmt: skip


def _stories(embed_dim: int, depth: int, heads: int, mlp_dim: int, **fields: Any) -> dict:
    return dict(
        embed_dim=embed_dim, depth=depth, num_heads=heads, mlp_dim=mlp_dim, tie_embeddings=True,
        **fields,
    )  # fmt: skip


def _llama3(embed_dim: int, depth: int, heads: int, mlp_dim: int, **fields: Any) -> dict:
    return dict(
        vocab_size=128256, embed_dim=embed_dim, depth=depth, num_heads=heads, mlp_dim=mlp_dim,
        num_kv_heads=8, rope_theta=500000.0, **fields,
    )  # fmt: skip


_LONG = dict(rope_scaling=rotary.Llama3(8.0))
_SMALL = dict(rope_scaling=rotary.Llama3(32.0), tie_embeddings=True)

VARIANTS: dict[str, Variant] = {
    "stories15m": Variant(fields=_stories(288, 6, 6, 768), params=15_191_712, **_STORIES),
    "stories42m": Variant(fields=_stories(512, 8, 8, 1376), params=41_689_600, **_STORIES),
    "stories110m": Variant(fields=_stories(768, 12, 12, 2048), params=109_529_856, **_STORIES),
    "llama_7b": Variant(fields=dict(epsilon=1e-6), params=6_738_415_616, **_LLAMA1),
    "llama_13b": Variant(
        fields=dict(embed_dim=5120, depth=40, num_heads=40, mlp_dim=13824, epsilon=1e-6),
        params=13_015_864_320, **_LLAMA1,
    ),
    "llama2_7b": Variant(fields={}, params=6_738_415_616, **_LLAMA2),
    "llama2_13b": Variant(
        fields=dict(embed_dim=5120, depth=40, num_heads=40, mlp_dim=13824),
        params=13_015_864_320, **_LLAMA2,
    ),
    "llama2_70b": Variant(
        fields=dict(embed_dim=8192, depth=80, num_heads=64, num_kv_heads=8, mlp_dim=28672),
        params=68_976_648_192, **_LLAMA2,
    ),
    "llama3_8b": Variant(fields=_llama3(4096, 32, 32, 14336), params=8_030_261_248, **_LLAMA3),
    "llama3_70b": Variant(fields=_llama3(8192, 80, 64, 28672), params=70_553_706_496, **_LLAMA3),
    "llama3.1_8b": Variant(
        fields=_llama3(4096, 32, 32, 14336, **_LONG), params=8_030_261_248, **_LLAMA3,
    ),
    "llama3.2_1b": Variant(
        fields=_llama3(2048, 16, 32, 8192, **_SMALL), params=1_235_814_400, **_LLAMA3,
    ),
    "llama3.2_3b": Variant(
        fields=_llama3(3072, 28, 24, 8192, **_SMALL), params=3_212_749_824, **_LLAMA3,
    ),
    "llama_tiny_1.1b": Variant(
        fields=dict(embed_dim=2048, depth=22, num_kv_heads=4, mlp_dim=5632), params=1_100_048_384,
        **_COMMON | dict(
            paper="TinyLlama, arXiv 2401.02385", code="github.com/jzhang38/TinyLlama",
            licence="Apache-2.0",
        ),
    ),
    "mistral_7b": Variant(
        fields=dict(mlp_dim=14336, num_kv_heads=8, window=4096), params=7_241_732_096,
        **_COMMON | dict(
            paper="Mistral 7B, arXiv 2310.06825", code="github.com/mistralai/mistral-inference",
            licence="Apache-2.0",
        ),
    ),
    "llama_test": Variant(
        fields=dict(
            vocab_size=97, embed_dim=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48,
        ),
        **_COMMON | dict(licence="none: no published weights", files=()),
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
