"""PatchTST as Hugging Face's transformers has it, the version whose weights are published.

Nie et al., "A Time Series is Worth 64 Words: Long-term Forecasting with Transformers", ICLR 2023,
arXiv 2211.14730. Code: github.com/huggingface/transformers, `models/patchtst` (Apache-2.0), which
we follow; its folders (ibm-granite/granite-timeseries-patchtst, namctin/patchtst_etth1_*) are read
with `zoo.load(FOLDER)`. With x_v the L steps of variate v, each read alone by the same weights:

    x_v = (x_v - mean x_v) / sqrt(var x_v + 1e-5)          or x_v / mean |x_v|, or as it is
    p   = patches of x_v, the last of which ends at step L; first steps that fill none are left out
    h   = W_p p + b + positions                            sinusoids, or learned
    h   = h + MHA(BN(h));  h = h + MLP(BN(h))              over patches, `depth` times
    y_v = W_h flatten(h_v) + b, and back to the scale of the series

It differs from the paper and its authors' code (`zoo.models.timeseries.patchtst_original`) and from
Time-Series-Library (`zoo.models.timeseries.patchtst`): norms come before their branches, and none
after the last; no patch repeats the end; no score is handed on; sinusoids are divided by ten of
their deviations. Choices: norms behind the branches or LayerNorms; attention over the variates of a
patch, with the weights of that over patches; a token in front, which is then read; a mean or
maximum over patches in place of `flatten`; and heads that give back hidden patches (pretraining),
classes, or numbers. The code's heads of distributions are not here, nor its heads of one variate
each, which it cannot run itself.

    features    transformers_patchtst_512_96
    embed       7  32  128
    layer0      7  32  128
    layer1      7  32  128
    layer2      7  32  128
    forecast    96  7
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules, norm_rules
from zoo.layers.attention import Attention
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.series import check_series, sinusoids, standardise
from zoo.system import System, Variant


def patch_count(length: int, patch_length: int, stride: int) -> int:
    """How many whole patches a series holds."""
    return (length - patch_length) // stride + 1


def patches_to_the_end(
    x: Float[Array, "batch variates time"], patch_length: int, stride: int
) -> Float[Array, "batch variates patches patch_length"]:
    """Windows of `patch_length` steps at every `stride`-th, the last of which ends the series.

    Raises:
      ValueError: if the series is shorter than a patch.
    """
    length = x.shape[2]
    if length < patch_length:
        raise ValueError(
            f"A series of {length} steps holds no patch of {patch_length}; choose a shorter "
            "patch_length or a longer context_length."
        )
    count = patch_count(length, patch_length, stride)
    first = length - patch_length - stride * (count - 1)
    starts = first + stride * np.arange(count)
    return x[..., starts[:, None] + np.arange(patch_length)]


def scaled_sinusoids(length: int, channels: int) -> Float[Array, "length channels"]:
    """Sinusoids less their mean, divided by ten of their deviations."""
    table = sinusoids(length, channels)
    return (table - table.mean()) / (10 * table.std(ddof=1))


def scale_series(
    x: Float[Array, "batch time variates"], scaling: str
) -> tuple[Float[Array, "batch time variates"], Array, Array]:
    """Each series of a window by itself; gives it, what was subtracted, what it was divided by.

    Args:
      x: the series.
      scaling: `std`, `mean` (of the absolute values, and nothing is subtracted) or `none`.

    Raises:
      ValueError: for another scaling.
    """
    if scaling == "std":
        return standardise(x)
    x = x.astype(jnp.float32)
    nothing = jnp.zeros_like(x[:, :1])
    if scaling == "mean":
        scale = jnp.maximum(jnp.abs(x).mean(1, keepdims=True), 1e-10)
        return x / scale, nothing, scale
    if scaling != "none":
        raise ValueError(f"scaling={scaling!r}; choose 'std', 'mean' or 'none'.")
    return x, nothing, nothing + 1


class Layer(nn.Module):
    """Attention over patches, then over variates where asked for, then the MLP."""

    num_heads: int
    mlp_dim: int
    activation: str
    mlp_bias: bool
    norm: str
    epsilon: float
    pre_norm: bool
    variate_attention: bool
    dropout: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch variates patches channels"], train: bool
    ) -> Float[Array, "batch variates patches channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = Attention(
            self.num_heads,
            fused=False,
            attention_dropout=self.dropout,
            dropout=self.dropout,
            name="attention",
            **types,
        )
        mlp = Mlp(
            self.mlp_dim,
            ACTIVATIONS[self.activation],
            self.dropout,
            self.mlp_bias,
            name="mlp",
            **types,
        )

        def attend(x: Array) -> Array:
            rows = x.reshape(-1, *x.shape[2:])
            return attention(rows, train=train).reshape(x.shape)

        x = self._branch("norm1", attend, x, train)
        if self.variate_attention:
            x = self._branch("norm_variates", attend, x.swapaxes(1, 2), train).swapaxes(1, 2)
        x = self._branch("norm2", lambda x: mlp(x, train), x, train)
        return constrain(x, "batch", None, "length", "channels")

    def _branch(self, name: str, branch, x: Array, train: bool) -> Array:
        """`x` plus a branch of it, with the norm before the branch or after the sum."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "epsilon": self.epsilon}
        if self.norm == "batch":
            norm = nn.BatchNorm(not train, momentum=0.9, name=name, **types)
        elif self.norm == "layer":
            norm = LayerNorm(name=name, **types)
        else:
            raise ValueError(f"norm={self.norm!r}; choose 'batch' or 'layer'.")
        return x + branch(norm(x)) if self.pre_norm else norm(x + branch(x))


class PatchTSTTransformers(Model):
    """PatchTST of transformers.

    Attributes:
      context_length: steps of the past that it sees, L.
      horizon: steps that it forecasts.
      variates: how many series there are.
      patch_length: steps of a patch.
      stride: steps from one patch to the next.
      embed_dim: width of a token.
      depth: layers.
      mlp_dim: width of the middle of an MLP.
      norm: `batch` or `layer`.
      epsilon: of the norms.
      pre_norm: whether norms come before their branches.
      variate_attention: whether each patch attends to the same one of the other variates, too.
      learned_positions: whether positions are trained.
      class_token: whether a token stands before the patches; a forecast, classes and numbers are
        then read from it.
      individual_embedding: a map of patches of its own for every variate.
      scaling: of each series of a window: `std`, `mean` or `none`.
      pooling: over patches, before the head: `mean`, `max` or `none`, which forecasts alone can do.
      head: what is read: `forecast`; `patches`, all of them as they were before they were hidden;
        `classes` or `numbers`, of all variates together; `none`: the tokens.
      num_classes: how many classes or numbers.
      number_range: numbers lie between these two; None: anywhere.
      mask_value: what stands in hidden patches.
    """

    context_length: int = 512
    horizon: int = 96
    variates: int = 7
    patch_length: int = 16
    stride: int = 16
    embed_dim: int = 128
    depth: int = 3
    num_heads: int = 16
    mlp_dim: int = 256
    activation: str = "gelu"
    mlp_bias: bool = True
    norm: str = "batch"
    epsilon: float = 1e-5
    pre_norm: bool = True
    variate_attention: bool = False
    learned_positions: bool = False
    class_token: bool = False
    individual_embedding: bool = False
    scaling: str = "std"
    pooling: str = "none"
    head: str = "forecast"
    num_classes: int = 0
    number_range: tuple[float, ...] | None = None
    mask_value: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self,
        series: Float[Array, "batch context variates"],
        hidden: Bool[Array, "batch variates patches"] | None = None,
        train: bool = False,
    ) -> Array:
        """What the head reads: `[batch horizon variates]` of a forecaster.

        `hidden` says which patches are not shown, as in the pretraining.
        """
        out = self.features(series, hidden, train)
        names = {"forecast": "forecast", "patches": "patches", "none": "tokens"}
        return out[names.get(self.head, "logits")]

    @nn.compact
    def features(
        self,
        series: Float[Array, "batch context variates"],
        hidden: Bool[Array, "batch variates patches"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        check_series(self, series, self.context_length, self.variates)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=nn.initializers.normal(0.02), **types)
        dropout = partial(nn.Dropout(self.dropout), deterministic=not train)
        x, shift, scale = scale_series(series, self.scaling)
        x = patches_to_the_end(x.swapaxes(1, 2), self.patch_length, self.stride)
        if hidden is not None:
            if hidden.shape != x.shape[:3]:
                raise ValueError(
                    f"This PatchTSTTransformers takes hidden of shape {x.shape[:3]}, which says "
                    f"for each patch whether it is hidden, not {hidden.shape}."
                )
            x = jnp.where(hidden[..., None], self.mask_value, x)
        if self.individual_embedding:
            maps = [dense(self.embed_dim, name=f"embed_{v}") for v in range(self.variates)]
            x = jnp.stack([maps[v](x[:, v]) for v in range(self.variates)], 1)
        else:
            x = dense(self.embed_dim, name="embed")(x)
        x = dropout(self._placed(x))
        out = {"embed": constrain(x, "batch", None, "length", "channels")}
        for i in range(self.depth):
            x = Layer(
                self.num_heads, self.mlp_dim, self.activation, self.mlp_bias, self.norm,
                self.epsilon, self.pre_norm, self.variate_attention, self.dropout,
                name=f"layers_{i}", **types,
            )(x, train)  # fmt: skip
            out[f"layer{i}"] = x
        if self.head == "none":
            return out | {"tokens": x}
        if self.head == "patches":
            x = x[:, :, 1:] if self.class_token else x
            return out | {"patches": dense(self.patch_length, name="head")(dropout(x))}
        x = dropout(self._pooled(x))
        if self.head == "forecast":
            y = dense(self.horizon, name="head")(x).swapaxes(1, 2)
            y = y.astype(jnp.float32) * scale + shift
            return out | {"forecast": y.astype(self.dtype)}
        if self.head not in ("classes", "numbers"):
            raise ValueError(
                f"head={self.head!r}; choose forecast, patches, classes, numbers or none."
            )
        y = dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))
        if self.number_range is not None and self.head == "numbers":
            least, most = self.number_range
            y = nn.sigmoid(y) * (most - least) + least
        return out | {"logits": y}

    def _placed(
        self, x: Float[Array, "batch variates patches channels"]
    ) -> Float[Array, "batch variates tokens channels"]:
        """Patches with their positions, and the class token before them."""

        def start(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
            if self.learned_positions:
                return jax.random.normal(key, shape, dtype)
            return scaled_sinusoids(*shape).astype(dtype)

        shape = (x.shape[2] + self.class_token, self.embed_dim)
        places = self.param("positions", start, shape, self.param_dtype)
        places = places if self.learned_positions else jax.lax.stop_gradient(places)
        places = places.astype(self.dtype)
        if not self.class_token:
            return x + places
        shape = (1, 1, 1, self.embed_dim)
        token = self.param("class_token", nn.initializers.normal(0.02), shape, self.param_dtype)
        token = jnp.broadcast_to(token.astype(self.dtype) + places[0], (*x.shape[:2], 1, shape[-1]))
        return jnp.concatenate([token, x + places[1:]], axis=2)

    def _pooled(
        self, x: Float[Array, "batch variates tokens channels"]
    ) -> Float[Array, "batch variates width"]:
        """One vector for each variate."""
        if self.class_token:
            return x[:, :, 0]
        if self.pooling == "mean":
            return x.mean(2)
        if self.pooling == "max":
            return x.max(2)
        if self.pooling != "none" or self.head != "forecast":
            choices = "'mean', 'max' or, to forecast, 'none'"
            raise ValueError(f"pooling={self.pooling!r} for {self.head}; choose {choices}.")
        return x.reshape(*x.shape[:2], -1)


# ---------------------------------------------------------------------------- checkpoints


def _layer_rules(theirs: str, ours: str) -> list[Rule]:
    rules = []
    for name, place in (
        ("self_attn.q_proj", "attention/query"),
        ("self_attn.k_proj", "attention/key"),
        ("self_attn.v_proj", "attention/value"),
        ("self_attn.out_proj", "attention/out"),
        ("ff.0", "mlp/up"),
        ("ff.3", "mlp/down"),
    ):
        rules += dense_rules(f"{theirs}.{name}", f"{ours}/{place}")
    for name, place in _NORMS.items():
        batch = batch_norm_rules(f"{theirs}.{name}.batchnorm", f"{ours}/{place}")
        layer = norm_rules(f"{theirs}.{name}", f"{ours}/{place}")
        rules += [Rule(r.source, r.target, when=lambda m: m.norm == "batch") for r in batch]
        rules += [Rule(r.source, r.target, when=lambda m: m.norm == "layer") for r in layer]
    return rules


_NORMS = {"norm_sublayer1": "norm1", "norm_sublayer2": "norm_variates", "norm_sublayer3": "norm2"}
_LAYER = "model.encoder.layers.{i}"


def _counter(name: str, model: PatchTSTTransformers, i: int) -> np.ndarray | None:
    """The count of batches that a torch BatchNorm keeps, where the model has one."""
    has = model.norm == "batch" and (name != "norm_sublayer2" or model.variate_attention)
    return np.zeros((), np.int64) if has else None


def _head_rules(name: str, *heads: str) -> list[Rule]:
    return [
        Rule(rule.source, rule.target, rule.transform, lambda m: m.head in heads)
        for rule in dense_rules(f"head.{name}", "head")
    ]


LAYOUTS = {
    "huggingface": Rules(
        [
            *dense_rules("model.encoder.embedder.input_embedding", "embed"),
            *dense_rules("model.encoder.embedder.input_embedding.{v}", "embed_{v}"),
            Rule("model.encoder.positional_encoder.position_enc", "positions"),
            Rule("model.encoder.positional_encoder.cls_token", "class_token"),
            *_layer_rules(_LAYER, "layers_{i}"),
            *_head_rules("projection", "forecast", "numbers"),
            *_head_rules("linear", "patches", "classes"),
        ],
        derived={
            f"{_LAYER}.{name}.batchnorm.num_batches_tracked": partial(_counter, name)
            for name in _NORMS
        },
        unused=("head.*",),  # of a folder with another head
        fresh=("head/kernel", "head/bias"),
    )
}

_COMMON = dict(
    module=PatchTSTTransformers,
    task="forecasting",
    paper="A Time Series is Worth 64 Words: Long-term Forecasting with Transformers, "
    "arXiv 2211.14730",
    code="github.com/huggingface/transformers",
    licence="Apache-2.0",
)

VARIANTS: dict[str, Variant] = {
    "transformers_patchtst_512_96": Variant(fields={}, params=797_024, **_COMMON),
    "transformers_patchtst_test": Variant(
        fields=dict(context_length=26, horizon=12, variates=3, patch_length=8, stride=4,
                    embed_dim=32, depth=2, mlp_dim=64, num_heads=4, learned_positions=True,
                    variate_attention=True),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, no_decay=(r".*positions", r".*class_token"))
