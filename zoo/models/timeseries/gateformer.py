"""Gateformer: attention over the time of each series and over the series, mixed by gates.

"Gateformer: Advancing Multivariate Time Series Forecasting through Temporal and Variate-Wise
Attention with Gated Representations", 2025, arXiv 2505.00307. Official code:
github.com/nyuolab/Gateformer (no licence seen), which we follow; no weights are published. With x_v
the L steps of variate v, each series of each window standardised by itself:

    g_v = W_g x_v + b                                        the series as a whole
    p   = W_p patches of x_v + positions                     8 steps each, one every 8; sinusoids
    p   = p + MHA(LN(p));   p = p + MLP(LN(p))               over patches, `depth` times
    t_v = W_t flatten(p) + b                                 its course
    u_v = a * g_v + (1 - a) * t_v,   a = sigmoid(W_1 g_v + W_2 t_v)
    c   = u + MHA(LN(u));   c = c + MLP(LN(c))               over variates, `depth` times
    o_v = b * u_v + (1 - b) * c_v,   b = sigmoid(W_3 u_v + W_4 c_v)
    y_v = W_h o_v + b_h                                      and back to the scale of the series

The last patch is one value, the last of the series, over and over. MLPs have ReLU; the configured
GELU never reaches them in the official code. The paper's MLP for g is one linear map there. It
takes time features and drops them: here there are none. Its layers of a stack start as copies of
one another, here each draws its own numbers.

    features    gateformer_etth1_96_96
    embed       7  64         g
    patches     7  13  64
    temporal    7  64         t
    gate1       7  64         u
    variate     7  64         c
    gate2       7  64         o
    forecast    96  7
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, dense_rules, linear, norm_rules
from zoo.layers.attention import Attention
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import (
    bias_init,
    check_series,
    embed_series,
    read_forecast,
    sinusoids,
    sinusoids_of,
    standardise,
)
from zoo.models.timeseries.patchtst import patches
from zoo.system import System, Variant


def attention_init(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """As PyTorch's MultiheadAttention starts: `qkv` by Xavier's rule, `out` as any Linear."""
    wide = shape[1] > shape[0]
    return (nn.initializers.xavier_uniform() if wide else torch_default_init)(key, shape, dtype)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm: PyTorch's encoder layer with `norm_first`."""

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        attention = Attention(
            self.num_heads,
            attention_dropout=self.dropout,
            dropout=self.dropout,
            kernel_init=attention_init,
            name="attention",
            **types,
        )
        x = x + attention(norm(name="norm1")(x), train=train)
        start = {"kernel_init": torch_default_init}
        mlp = Mlp(self.mlp_dim, nn.relu, self.dropout, name="mlp", **start, **types)
        x = x + mlp(norm(name="norm2")(x), train)
        return constrain(x, "batch", "length", "channels")


class Gate(nn.Module):
    """`a * x + (1 - a) * y` with a = sigmoid(first(x) + second(y))."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch channels"], y: Float[Array, "*batch channels"]
    ) -> Float[Array, "*batch channels"]:
        channels = x.shape[-1]
        start = {"kernel_init": torch_default_init, "bias_init": bias_init(channels)}
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, channels, **start, **types)
        a = nn.sigmoid(dense(name="first")(x) + dense(name="second")(y))
        return a * x + (1 - a) * y


class Gateformer(Model):
    """Gateformer.

    Attributes:
      context_length: steps of the past that it sees.
      horizon: steps that it forecasts.
      variates: of `example_inputs`; the model takes any number.
      patch_length: steps of a patch.
      stride: steps from one patch to the next.
      embed_dim: width of a token.
      depth: layers over patches, and as many over variates.
      mlp_dim: width of the middle of an MLP.
    """

    context_length: int = 96
    horizon: int = 96
    variates: int = 7
    patch_length: int = 8
    stride: int = 8
    embed_dim: int = 512
    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 512
    dropout: float = 0.1
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
        """Every named intermediate (see the table above)."""
        check_series(self, series, self.context_length)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, self.embed_dim, kernel_init=torch_default_init, **types)
        dropout = partial(nn.Dropout(self.dropout), deterministic=not train)
        sizes = (self.num_heads, self.mlp_dim, self.dropout)
        x, mean, deviation = standardise(series)
        whole = embed_series(self, x, train)

        x = patches(x.swapaxes(1, 2), self.patch_length, self.stride)
        x = dense(use_bias=False, name="patch_embed")(x)
        x = dropout(x + sinusoids(x.shape[2], self.embed_dim).astype(self.dtype))
        shape = x.shape  # batch, variates, patches, channels
        x = x.reshape(-1, *shape[2:])
        for i in range(self.depth):
            x = Block(*sizes, name=f"temporal_{i}", **types)(x, train)
        out = {"embed": whole, "patches": x.reshape(shape)}
        x = out["patches"].swapaxes(2, 3).reshape(*shape[:2], -1)  # channels first, as in PatchTST
        temporal = dropout(dense(bias_init=bias_init(x.shape[-1]), name="readout")(x))

        x = out["gate1"] = Gate(name="gate1", **types)(whole, temporal)
        y = x
        for i in range(self.depth):
            y = Block(*sizes, name=f"variate_{i}", **types)(y, train)
        x = out["gate2"] = Gate(name="gate2", **types)(x, y)
        out |= {"temporal": temporal, "variate": y}
        out["forecast"] = read_forecast(self, x, mean, deviation)
        return out


# ---------------------------------------------------------------------------- checkpoints


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of PyTorch's encoder layer."""
    return [
        Rule(f"{theirs}.self_attn.in_proj_weight", f"{ours}/attention/qkv/kernel", linear),
        Rule(f"{theirs}.self_attn.in_proj_bias", f"{ours}/attention/qkv/bias"),
        *dense_rules(f"{theirs}.self_attn.out_proj", f"{ours}/attention/out"),
        *dense_rules(f"{theirs}.linear1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.linear2", f"{ours}/mlp/down"),
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
    ]


LAYOUTS = {
    "official": Rules(
        [
            *dense_rules("project_embedding.value_embedding", "embed"),
            Rule("patch_embedding.value_embedding.weight", "patch_embed/kernel", linear),
            *_block_rules("enc_temporal.layers.{i}", "temporal_{i}"),
            *dense_rules("head.linear", "readout"),
            *dense_rules("gate_w1", "gate1/first"),
            *dense_rules("gate_w2", "gate1/second"),
            *_block_rules("enc_variate.layers.{i}", "variate_{i}"),
            *dense_rules("gate_w3", "gate2/first"),
            *dense_rules("gate_w4", "gate2/second"),
            *dense_rules("projection", "head"),
        ],
        derived={"patch_embedding.position_embedding.pe": sinusoids_of},
        fresh=("head/kernel", "head/bias"),
    )
}

_COMMON = dict(
    module=Gateformer,
    task="forecasting",
    paper="Gateformer: Advancing Multivariate Time Series Forecasting through Temporal and "
    "Variate-Wise Attention with Gated Representations, arXiv 2505.00307",
    code="github.com/nyuolab/Gateformer",
    licence="none: no published weights",
)

# Table -> variates, heads, and for each horizon depth, width and width of the MLP.
_SCRIPTS: dict[str, tuple[int, int, dict[int, tuple[int, int, int]]]] = {
    "etth1": (7, 4, {96: (1, 64, 64), 192: (2, 64, 64), 336: (2, 128, 128), 720: (2, 64, 64)}),
    "ettm1": (7, 4, {96: (1, 64, 64), 192: (1, 128, 128), 336: (1, 128, 128), 720: (1, 64, 64)}),
    "weather": (21, 8, {96: (2, 512, 1024), 192: (2, 512, 1024), 336: (2, 256, 256),
                        720: (2, 256, 512)}),
    "ecl": (321, 8, {96: (2, 512, 512), 192: (4, 512, 1024), 336: (2, 512, 1024),
                     720: (2, 512, 1024)}),
}  # fmt: skip


def _params(horizon: int, depth: int, width: int, mlp: int) -> int:
    """Parameters of a model that sees 96 steps in patches of 8."""
    block = 4 * width * (width + 1) + mlp * (2 * width + 1) + 5 * width
    readout = (13 * width + 1) * width
    gates = 4 * width * (width + 1)
    return (97 + 8) * width + 2 * depth * block + readout + gates + (width + 1) * horizon


VARIANTS: dict[str, Variant] = {
    f"gateformer_{table}_96_{horizon}": Variant(
        fields=dict(horizon=horizon, variates=variates, num_heads=heads, depth=depth,
                    embed_dim=width, mlp_dim=mlp),
        params=_params(horizon, depth, width, mlp),
        **_COMMON,
    )
    for table, (variates, heads, horizons) in _SCRIPTS.items()
    for horizon, (depth, width, mlp) in horizons.items()
} | {
    "gateformer_test": Variant(
        fields=dict(context_length=24, horizon=12, variates=5, embed_dim=32, mlp_dim=64,
                    num_heads=4, depth=1),
        **_COMMON,
    )
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
