"""PatchTST as its authors' own code has it: learned positions, batch norm, and scores handed on.

Nie et al., "A Time Series is Worth 64 Words: Long-term Forecasting with Transformers", ICLR 2023,
arXiv 2211.14730. Code: github.com/yuqinie98/PatchTST (Apache-2.0), the supervised half, which we
follow; no supervised weights are published. `zoo.models.timeseries.patchtst` is the
Time-Series-Library's version, which has more tasks and fewer choices. With x_v the L steps of
variate v, each read alone by the same weights:

    x_v = (x_v - mean x_v) / sqrt(var x_v + 1e-5) * a_v + b_v      reversible: undone at the end
    p   = patches of 16 steps, one every 8, of x_v with its last value repeated 8 times more
    h   = W_p p + b + positions
    s_l = scale q k^T + s_(l-1);   h = BN(h + W_o softmax(s_l) v);   h = BN(h + MLP(h))
    y_v = W_h flatten(h_v) + b,  and back to the scale of the series

Choices of the code: the last value in place of the mean; no repeated end; one head a variate; the
norms before their branches (then what is added to is the normed x, and nothing norms the end); no
handing on of scores; and a sum of two such models, of the trend and of the rest. The paper does not
speak of scores handed on; the code's scripts always do it. Its LayerNorm in place of BatchNorm is
not here: the argument never reaches the layers.

    features    original_patchtst_etth1_336_96
    embed       7  42  16
    layer0      7  42  16
    layer1      7  42  16
    layer2      7  42  16
    forecast    96  7
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init, check_series, decompose
from zoo.models.timeseries.patchtst import patch_count, patches
from zoo.system import System, Variant


class ReversibleNorm(nn.Module):
    """RevIN: each series of a window by its own deviation, times and plus learned numbers.

    Attributes:
      affine: whether there are learned numbers.
      subtract_last: subtract the last value in place of the mean.
    """

    affine: bool = True
    subtract_last: bool = False
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time variates"]
    ) -> tuple[Float[Array, "batch time variates"], Callable[[Array], Array]]:
        """The normed series, and a function that takes a forecast back to their scale."""
        x = x.astype(jnp.float32)
        mean = x[:, -1:] if self.subtract_last else jax.lax.stop_gradient(x.mean(1, keepdims=True))
        deviation = jax.lax.stop_gradient(jnp.sqrt(x.var(1, keepdims=True) + 1e-5))
        scale, bias = 1.0, 0.0
        if self.affine:
            shape = x.shape[-1:]
            scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
            bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)

        def undo(y: Float[Array, "batch time variates"]) -> Float[Array, "batch time variates"]:
            y = y.astype(jnp.float32) - bias
            return (y / (scale + 1e-10) if self.affine else y) * deviation + mean

        return (x - mean) / deviation * scale + bias, undo


class ScoredAttention(nn.Module):
    """Attention whose scores, before the softmax, are added to those of the layer before.

    Dense: the scores themselves are handed on. Their factor is a tensor of the checkpoint.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        previous: Float[Array, "batch heads length length"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch heads length length"]]:
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        start = {"kernel_init": torch_default_init, "bias_init": bias_init(channels)}
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, channels, **start, **types)

        def heads(name: str) -> Float[Array, "batch length heads head_dim"]:
            y = dense(name=name)(x).reshape(*x.shape[:2], self.num_heads, -1)
            return constrain(y, "batch", "length", "heads", "head_dim")

        query, key, value = heads("query"), heads("key"), heads("value")
        factor = nn.initializers.constant(query.shape[-1] ** -0.5)
        scale = jax.lax.stop_gradient(self.param("scale", factor, (), self.param_dtype))
        scores = jnp.einsum(
            "bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32
        ) * scale.astype(jnp.float32)
        scores = scores if previous is None else scores + previous
        weights = nn.softmax(scores).astype(self.dtype)
        y = jnp.einsum("bnqk,bknd->bqnd", weights, value).reshape(x.shape)
        return nn.Dropout(self.dropout)(dense(name="out")(y), deterministic=not train), scores


class Layer(nn.Module):
    """Attention and MLP with their norms."""

    num_heads: int
    mlp_dim: int
    activation: Callable
    pre_norm: bool
    dropout: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], scores: Array | None, train: bool
    ) -> tuple[Float[Array, "batch length channels"], Array]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, **types)
        skip = lambda name: _same  # noqa: E731
        before, after = (norm, skip) if self.pre_norm else (skip, norm)
        attention = ScoredAttention(self.num_heads, self.dropout, name="attention", **types)
        x = before(name="norm1")(x)
        y, scores = attention(x, scores, train)
        x = after(name="norm1")(x + nn.Dropout(self.dropout)(y, deterministic=not train))
        x = before(name="norm2")(x)
        sizes = (self.mlp_dim, self.activation, self.dropout)
        y = Mlp(*sizes, kernel_init=torch_default_init, name="mlp", **types)(x, train)
        x = after(name="norm2")(x + y)
        return constrain(x, "batch", "length", "channels"), scores


def _same(x: Array) -> Array:
    return x


def _near_zero(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """How the code starts positions."""
    return jax.random.uniform(key, shape, dtype, -0.02, 0.02)


class PatchTSTOriginal(Model):
    """PatchTST of its authors.

    Attributes:
      context_length: steps of the past that it sees, L.
      horizon: steps that it forecasts.
      variates: how many series there are.
      patch_length: steps of a patch.
      stride: steps from one patch to the next.
      pad_end: whether the last value is repeated for one more patch.
      embed_dim: width of a token.
      depth: layers.
      mlp_dim: width of the middle of an MLP.
      pre_norm: whether norms come before their branches.
      residual_attention: whether scores are handed on from layer to layer.
      wide_positions: a position has `embed_dim` numbers, or one.
      learned_positions: whether positions are trained.
      standardise: each series of a window by its own mean and deviation, and back.
      affine: then times and plus learned numbers.
      subtract_last: the last value in place of the mean.
      individual: a head of its own for every variate.
      moving_average: width of the average that is the trend, odd: one model of the trend, one of
        the rest; 0: one model.
    """

    context_length: int = 336
    horizon: int = 96
    variates: int = 7
    patch_length: int = 16
    stride: int = 8
    pad_end: bool = True
    embed_dim: int = 128
    depth: int = 3
    num_heads: int = 16
    mlp_dim: int = 256
    activation: Callable = gelu
    pre_norm: bool = False
    residual_attention: bool = True
    wide_positions: bool = True
    learned_positions: bool = True
    standardise: bool = True
    affine: bool = False
    subtract_last: bool = False
    individual: bool = False
    moving_average: int = 0
    dropout: float = 0.2
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> Float[Array, "batch horizon variates"]:
        """The forecast."""
        return self.features(series, train)["forecast"]

    @nn.compact
    def features(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); two models have `rest_`, `trend_`."""
        check_series(self, series, self.context_length, self.variates)
        if not self.moving_average:
            return self._read(series, "", train)
        rest, trend = decompose(series, self.moving_average)
        out = self._read(rest, "rest_", train) | self._read(trend, "trend_", train)
        return out | {"forecast": out["rest_forecast"] + out["trend_forecast"]}

    def _read(
        self, series: Float[Array, "batch context variates"], part: str, train: bool
    ) -> dict[str, Array]:
        """Every named intermediate of one model, whose modules have the name of a part before."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout = partial(nn.Dropout(self.dropout), deterministic=not train)
        x, undo = series, _same
        if self.standardise:
            sizes = (self.affine, self.subtract_last, self.param_dtype)
            x, undo = ReversibleNorm(*sizes, name=f"{part}reversible")(series)
        x = patches(x.swapaxes(1, 2), self.patch_length, self.stride)
        x = x if self.pad_end else x[:, :, :-1]
        start = {"kernel_init": torch_default_init, "bias_init": bias_init(self.patch_length)}
        x = Dense(self.embed_dim, name=f"{part}embed", **start, **types)(x)
        shape = (x.shape[2], self.embed_dim if self.wide_positions else 1)
        place = self.param(f"{part}positions", _near_zero, shape, self.param_dtype)
        place = place if self.learned_positions else jax.lax.stop_gradient(place)
        x = dropout(x + place.astype(self.dtype))
        shape, scores = x.shape, None
        out = {f"{part}embed": constrain(x, "batch", None, "length", "channels")}
        x = x.reshape(-1, *shape[2:])
        sizes = (self.num_heads, self.mlp_dim, self.activation, self.pre_norm)
        for i in range(self.depth):
            layer = Layer(*sizes, self.dropout, name=f"{part}layers_{i}", **types)
            x, scores = layer(x, scores, train)
            scores = scores if self.residual_attention else None
            out[f"{part}layer{i}"] = x.reshape(shape)
        # as the authors flatten it: channels first
        x = x.reshape(shape).swapaxes(2, 3).reshape(*shape[:2], -1)
        start["bias_init"] = bias_init(x.shape[-1])
        dense = partial(Dense, self.horizon, **start, **types)
        if self.individual:
            each = [dense(name=f"{part}head_{v}")(x[:, v]) for v in range(shape[1])]
            y = jnp.stack(each, axis=2)
        else:
            y = dense(name=f"{part}head")(x).swapaxes(1, 2)
        return out | {f"{part}forecast": undo(y).astype(self.dtype)}


# ---------------------------------------------------------------------------- checkpoints


def _rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of one backbone."""
    layer, block = f"{theirs}.backbone.encoder.layers.{{i}}", f"{ours}layers_{{i}}"
    rules = [
        Rule(f"{theirs}.revin_layer.affine_weight", f"{ours}reversible/scale"),
        Rule(f"{theirs}.revin_layer.affine_bias", f"{ours}reversible/bias"),
        Rule(f"{theirs}.backbone.W_pos", f"{ours}positions"),
        *dense_rules(f"{theirs}.backbone.W_P", f"{ours}embed"),
        Rule(f"{layer}.self_attn.sdp_attn.scale", f"{block}/attention/scale"),
    ]
    for name, place in (
        ("self_attn.W_Q", "attention/query"),
        ("self_attn.W_K", "attention/key"),
        ("self_attn.W_V", "attention/value"),
        ("self_attn.to_out.0", "attention/out"),
        ("ff.0", "mlp/up"),
        ("ff.3", "mlp/down"),
    ):
        rules += dense_rules(f"{layer}.{name}", f"{block}/{place}")
    for name, place in (("norm_attn", "norm1"), ("norm_ffn", "norm2")):
        rules += batch_norm_rules(f"{layer}.{name}.1", f"{block}/{place}")
    rules += dense_rules(f"{theirs}.head.linear", f"{ours}head")
    return rules + dense_rules(f"{theirs}.head.linears.{{i}}", f"{ours}head_{{i}}")


_PARTS = {"model": "", "model_res": "rest_", "model_trend": "trend_"}


def _counter(part: str) -> Callable[[PatchTSTOriginal, int], np.ndarray | None]:
    """The count of batches that a torch BatchNorm of a part keeps, if the model has the part."""

    def count(model: PatchTSTOriginal, i: int) -> np.ndarray | None:
        has = (not part) != bool(model.moving_average) and i < model.depth
        return np.zeros((), np.int64) if has else None

    return count


LAYOUTS = {
    "official": Rules(
        [rule for theirs, ours in _PARTS.items() for rule in _rules(theirs, ours)],
        derived={
            f"{theirs}.backbone.encoder.layers.{{i}}.{norm}.1.num_batches_tracked": _counter(ours)
            for theirs, ours in _PARTS.items()
            for norm in ("norm_attn", "norm_ffn")
        },
        fresh=("head/kernel", "head/bias"),
    )
}

_COMMON = dict(
    module=PatchTSTOriginal,
    task="forecasting",
    paper="A Time Series is Worth 64 Words: Long-term Forecasting with Transformers, "
    "arXiv 2211.14730",
    code="github.com/yuqinie98/PatchTST",
    licence="Apache-2.0",
)

_SMALL = dict(embed_dim=16, num_heads=4, mlp_dim=128, dropout=0.3)

# Table -> variates, context, horizons, and what its official script sets.
_SCRIPTS: dict[str, tuple[int, int, tuple[int, ...], dict[str, Any]]] = {
    "etth1": (7, 336, (96, 192, 336, 720), _SMALL),
    "etth2": (7, 336, (96, 192, 336, 720), _SMALL),
    "ettm1": (7, 336, (96, 192, 336, 720), {}),
    "ettm2": (7, 336, (96, 192, 336, 720), {}),
    "weather": (21, 336, (96, 192, 336, 720), {}),
    "ecl": (321, 336, (96, 192, 336, 720), {}),
    "traffic": (862, 336, (96, 192, 336, 720), {}),
    "ili": (7, 104, (24, 36, 48, 60), dict(_SMALL, patch_length=24, stride=2)),
}


def _forecaster(variates: int, context: int, horizon: int, fields: dict[str, Any]) -> Variant:
    """A variant with its number of parameters."""
    fields = dict(context_length=context, horizon=horizon, variates=variates, **fields)
    model = PatchTSTOriginal(**fields)
    width, tokens = model.embed_dim, patch_count(context, model.patch_length, model.stride)
    layer = 4 * width * (width + 1) + 2 * width * model.mlp_dim + model.mlp_dim + 5 * width + 1
    embed = (model.patch_length + 1 + tokens) * width
    params = embed + model.depth * layer + (width * tokens + 1) * horizon
    return Variant(fields=fields, params=params, **_COMMON)


VARIANTS: dict[str, Variant] = {
    f"original_patchtst_{table}_{context}_{horizon}": _forecaster(
        variates, context, horizon, fields
    )
    for table, (variates, context, horizons, fields) in _SCRIPTS.items()
    for horizon in horizons
} | {
    "original_patchtst_test": Variant(
        fields=dict(context_length=24, horizon=12, variates=3, patch_length=8, stride=4,
                    embed_dim=32, depth=2, mlp_dim=64, num_heads=4, affine=True),
        **_COMMON,
    )
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    frozen=(r".*/attention/scale",),
    no_decay=(r".*positions", r".*reversible/(scale|bias)"),
)
