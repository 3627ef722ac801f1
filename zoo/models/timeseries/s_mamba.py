"""S-Mamba: two Mamba blocks read the variates as a sequence, one forwards and one backwards.

Wang et al., "Is Mamba Effective for Time Series Forecasting?", Neurocomputing 2024, arXiv
2403.11144. Official code: github.com/wzhwzhwzh0921/S-D-Mamba (no licence), which we follow; its
Mamba is that of github.com/state-spaces/mamba (Apache-2.0), arXiv 2312.00752. No weights are
published. A whole series is one token, as in iTransformer; with tokens u_1 ... u_N, one a variate:

    [x, z] = W u;   x_n = silu(causal convolution of x over 2 tokens, each channel by itself)
    [r, B, C] = V x;   d = softplus(W_d r + b_d);   A = -exp(A_log)      step sizes, one a channel
    h_n = exp(d_n A) h_{n-1} + d_n x_n B_n^T;   y_n = h_n C_n + D x_n    state: channels x states
    M(u) = W_o (y * silu(z))
    layer:  u = LN(u + M_f(u) + flip M_b(flip u));   u = LN(u + MLP(u))

`depth` layers, LN, and a linear map to the horizon; each series of each window is standardised by
itself before, and put back after. The order of the variates matters, and time features are tokens
behind them: last for M_f, first for M_b.

Since 24 April 2024 each layer of the official code also builds two Mamba blocks and an attention,
of width 11, that it never calls: 2,464 numbers. They are no parameters here, and loading drops
them. The layout "official" is that of the code before, without them; "unused_too" writes zeros
under their names, so that the code of today takes the file. Our counts are without them: 314,944
for the table below, where that code counts 319,872.

    features    s_mamba_ettm1_96_192
    embed        11  128    7 variates and 4 time features
    layer0       11  128
    layer1       11  128
    norm         11  128
    forecast    192  7
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, chain, conv, dense_rules, linear, norm_rules, split
from zoo.layers.decoder import ShortConv
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import (
    bias_init,
    check_series,
    check_time_features,
    embed_series,
    example_series,
    mlp_rules,
    read_forecast,
    standardise,
)
from zoo.system import System, Variant

State = dict[str, Array]


def step_bias_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """What softplus turns into step sizes between 0.001 and 0.1, evenly in their logarithm."""
    low, high = np.log(0.001), np.log(0.1)
    size = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    return (size + jnp.log(-jnp.expm1(-size))).astype(dtype)


def decay_init(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Log 1, log 2, ... in each channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape).astype(dtype)


class Mamba(nn.Module):
    """A Mamba block: a gated selective scan; see the module.

    Attributes:
      state_size: numbers of the state of a channel.
      conv_size: tokens of the convolution.
      expand: inner channels over those of the tokens.
      step_rank: width between the two maps of a step size; None: a 16th of the tokens, rounded up.
      conv_bias: whether the convolution has a bias.
      use_bias: whether the maps into and out of the block have biases.
    """

    state_size: int = 16
    conv_size: int = 4
    expand: float = 2
    step_rank: int | None = None
    conv_bias: bool = True
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def init_state(self, batch: int, channels: int, length: int = 0) -> State:
        """Empty inputs of the convolution and an empty scan; `length` does not matter."""
        inner = int(self.expand * channels)
        return {
            "conv": jnp.zeros((batch, self.conv_size - 1, inner), self.dtype),
            "memory": jnp.zeros((batch, inner, self.state_size), jnp.float32),
        }

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: State | None = None
    ) -> tuple[Float[Array, "batch length channels"], State | None]:
        """The mixed tokens and, where there is a state to go on from, the next one."""
        channels, rank = x.shape[-1], self.step_rank or -(-x.shape[-1] // 16)
        inner, states = int(self.expand * channels), self.state_size
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, use_bias=self.use_bias, kernel_init=torch_default_init, **types)
        before = state or {"conv": None, "memory": None}
        gate = nn.silu(dense(inner, name="gate_proj")(x))
        start = {"kernel_init": torch_default_init}
        if self.conv_bias:
            start["bias_init"] = bias_init(self.conv_size)
        conv = ShortConv(self.conv_size, name="conv", **start, **types)
        x, last = conv(dense(inner, name="in_proj")(x), before["conv"])
        x = constrain(x, "batch", "length", "mlp")
        sizes = dense(rank + 2 * states, use_bias=False, name="x_proj")(x)
        step, B, C = jnp.split(sizes, [rank, rank + states], axis=-1)
        step = Dense(
            inner,
            kernel_init=torch_default_init,
            bias_init=step_bias_init,
            dtype=jnp.float32,  # rounded step sizes compound over the scan
            param_dtype=self.param_dtype,
            name="dt_proj",
        )(step)
        A = -jnp.exp(self.param("A_log", decay_init, (inner, states), jnp.float32))
        D = self.param("D", nn.initializers.ones, (inner,), jnp.float32)
        y, memory = kernels_pallas.selective_scan(
            x, nn.softplus(step), A, B, C, D=D, initial_state=before["memory"]
        )
        y = dense(channels, name="out")(y * gate)
        return y, None if state is None else {"conv": last, "memory": memory}


class Block(nn.Module):
    """Mamba blocks in both directions, and MLP; residual connection and LayerNorm after each."""

    state_size: int
    conv_size: int
    expand: float
    mlp_dim: int
    activation: Callable
    dropout: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch variates channels"], train: bool
    ) -> Float[Array, "batch variates channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mamba = partial(Mamba, self.state_size, self.conv_size, self.expand, **types)
        y = mamba(name="forward")(x)[0] + mamba(name="backward")(x[:, ::-1])[0][:, ::-1]
        x = LayerNorm(epsilon=1e-5, name="norm1", **types)(x + y)
        start = {"kernel_init": torch_default_init}
        sizes = (self.mlp_dim, self.activation, self.dropout)
        y = Mlp(*sizes, name="mlp", **start, **types)(x, train)
        x = LayerNorm(epsilon=1e-5, name="norm2", **types)(x + y)
        return constrain(x, "batch", "length", "channels")


class SMamba(Model):
    """S-Mamba.

    Attributes:
      context_length: steps of the past that it sees.
      horizon: steps that it forecasts.
      variates: of `example_inputs`; the model takes any number.
      time_features: numbers of the date of a step, each of which becomes a token; 0: none.
      embed_dim: width of a token.
      depth: layers.
      mlp_dim: width of the middle of an MLP.
      state_size: numbers of the state of a channel.
      conv_size: tokens of the convolution.
      expand: inner channels of a Mamba block over those of a token.
      standardise: each series of a window by its own mean and deviation, and back.
    """

    context_length: int = 96
    horizon: int = 96
    variates: int = 7
    time_features: int = 4
    embed_dim: int = 512
    depth: int = 2
    mlp_dim: int = 512
    state_size: int = 32
    conv_size: int = 2
    expand: float = 1
    activation: Callable = gelu
    standardise: bool = True
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return example_series(self, batch_size)

    def __call__(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Float[Array, "batch context features"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch horizon variates"]:
        """The forecast."""
        return self.features(series, time_features, train)["forecast"]

    @nn.compact
    def features(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Float[Array, "batch context features"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        check_series(self, series, self.context_length)
        check_time_features(self, time_features, series.shape[0])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x, mean, deviation = standardise(series) if self.standardise else (series, 0.0, 1.0)
        if time_features is not None:
            x = jnp.concatenate([x, time_features.astype(x.dtype)], axis=-1)
        x = embed_series(self, x, train)
        out = {"embed": x}
        sizes = (self.state_size, self.conv_size, self.expand)
        sizes += (self.mlp_dim, self.activation, self.dropout)
        for i in range(self.depth):
            x = out[f"layer{i}"] = Block(*sizes, name=f"layers_{i}", **types)(x, train)
        x = out["norm"] = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        out["forecast"] = read_forecast(self, x[:, : series.shape[-1]], mean, deviation)
        return out


_MAMBA = r".*(forward|backward)"

PARTITION = {
    rf"{_MAMBA}/(in_proj|gate_proj)/kernel": ("channels", "heads"),
    rf"{_MAMBA}/conv/kernel": (None, None, "heads"),
    rf"{_MAMBA}/conv/bias": ("heads",),
    rf"{_MAMBA}/x_proj/kernel": ("heads", "channels"),
    rf"{_MAMBA}/dt_proj/kernel": (None, "heads"),
    rf"{_MAMBA}/dt_proj/bias": ("heads",),
    rf"{_MAMBA}/A_log": ("heads", None),
    rf"{_MAMBA}/D": ("heads",),
}

# ---------------------------------------------------------------------------- checkpoints


def mamba_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of a block of the mamba-ssm library; each prefix is empty or ends in a separator."""
    both = (f"{ours}in_proj/kernel", f"{ours}gate_proj/kernel")
    return [
        Rule(f"{theirs}in_proj.weight", both, chain(linear, split(1))),
        Rule(f"{theirs}in_proj.bias", (f"{ours}in_proj/bias", f"{ours}gate_proj/bias"), split(0)),
        Rule(f"{theirs}conv1d.weight", f"{ours}conv/kernel", conv),
        Rule(f"{theirs}conv1d.bias", f"{ours}conv/bias"),
        Rule(f"{theirs}x_proj.weight", f"{ours}x_proj/kernel", linear),
        *dense_rules(f"{theirs}dt_proj", f"{ours}dt_proj"),
        Rule(f"{theirs}A_log", f"{ours}A_log"),
        Rule(f"{theirs}D", f"{ours}D"),
        *dense_rules(f"{theirs}out_proj", f"{ours}out"),
    ]


_LAYER = "encoder.attn_layers.{i}"
_RULES = [
    *dense_rules("enc_embedding.value_embedding", "embed"),
    *mamba_rules(f"{_LAYER}.attention.", "layers_{i}/forward/"),
    *mamba_rules(f"{_LAYER}.attention_r.", "layers_{i}/backward/"),
    *norm_rules(f"{_LAYER}.norm1", "layers_{i}/norm1"),
    *norm_rules(f"{_LAYER}.norm2", "layers_{i}/norm2"),
    *mlp_rules(_LAYER, "layers_{i}"),
    *norm_rules("encoder.norm", "norm"),
    *dense_rules("projector", "head"),
]
_FRESH = ("head/kernel", "head/bias")

# Blocks that the official code builds and never calls: name in a layer -> tensors and shapes.
_UNUSED_MAMBA = {
    "A_log": (11, 16), "D": (11,), "in_proj.weight": (22, 11), "conv1d.weight": (11, 1, 2),
    "conv1d.bias": (11,), "x_proj.weight": (33, 11), "dt_proj.weight": (11, 1),
    "dt_proj.bias": (11,), "out_proj.weight": (11, 11),
}  # fmt: skip
_UNUSED_ATTENTION = {
    f"{name}_projection.{part}": shape
    for name in ("query", "key", "value", "out")
    for part, shape in (("weight", (11, 11)), ("bias", (11,)))
}
_UNUSED = {"man": _UNUSED_MAMBA, "man2": _UNUSED_MAMBA, "a": _UNUSED_ATTENTION}


def _zeros(shape: tuple[int, ...], model: SMamba, i: int) -> np.ndarray | None:
    return np.zeros(shape, np.float32) if i < model.depth else None


LAYOUTS = {
    "official": Rules(_RULES, unused=[f"{_LAYER}.{name}.*" for name in _UNUSED], fresh=_FRESH),
    "unused_too": Rules(
        _RULES,
        derived={
            f"{_LAYER}.{block}.{name}": partial(_zeros, shape)
            for block, tensors in _UNUSED.items()
            for name, shape in tensors.items()
        },
        fresh=_FRESH,
    ),
}

_COMMON = dict(
    module=SMamba,
    task="forecasting",
    paper="Is Mamba Effective for Time Series Forecasting?, arXiv 2403.11144",
    code="github.com/wzhwzhwzh0921/S-D-Mamba",
    licence="none: no published weights",
)

_LONG, _SHORT = (96, 192, 336, 720), (12, 24, 48, 96)
_UNSCALED = {"time_features": 0, "standardise": False}

# Table -> variates, horizons, and for these depth, width and states, each one or one a horizon.
_SCRIPTS: dict[str, tuple] = {
    "etth1": (7, _LONG, 2, 256, 2, {}),
    "etth2": (7, _LONG, 2, 256, 2, {}),
    "ettm1": (7, _LONG, 2, (256, 128, 128, 128), 2, {}),
    "ettm2": (7, _LONG, 2, (256, 128, 128, 128), 2, {}),
    "exchange": (8, _LONG, 2, 128, 32, {}),
    "weather": (21, _LONG, 3, 512, 2, {}),
    "ecl": (321, _LONG, 3, 512, (16, 32, 32, 32), {}),
    "traffic": (862, _LONG, 4, 512, 32, {}),
    "solar": (137, _LONG, 2, 512, 32, {"time_features": 0}),
    "pems03": (358, _SHORT, (4, 4, 5, 4), 512, 32, {"time_features": 0}),
    "pems04": (307, _SHORT, 4, 1024, 32, _UNSCALED),
    "pems07": (883, _SHORT, (2, 2, 4, 4), 512, 32, _UNSCALED),
    "pems08": (170, _SHORT, (2, 2, 4, 4), (512, 512, 256, 256), 32, {"time_features": 0}),
}


def _params(horizon: int, depth: int, width: int, states: int) -> int:
    """Parameters of a model that sees 96 steps and whose MLP is as wide as a token."""
    mamba = 3 * width**2 + (2 * -(-width // 16) + 3 * states + 5) * width
    block = 2 * mamba + 2 * width * (width + 1) + 4 * width
    return 97 * width + depth * block + 2 * width + (width + 1) * horizon


def _variants() -> dict[str, Variant]:
    variants = {}
    for table, (variates, horizons, *sizes, more) in _SCRIPTS.items():
        for i, horizon in enumerate(horizons):
            depth, width, states = (s[i] if isinstance(s, tuple) else s for s in sizes)
            variants[f"s_mamba_{table}_96_{horizon}"] = Variant(
                fields=dict(horizon=horizon, variates=variates, depth=depth, embed_dim=width,
                            mlp_dim=width, state_size=states, **more),
                params=_params(horizon, depth, width, states),
                **_COMMON,
            )  # fmt: skip
    return variants


VARIANTS: dict[str, Variant] = _variants() | {
    "s_mamba_test": Variant(
        fields=dict(context_length=24, horizon=12, variates=5, embed_dim=32, mlp_dim=64,
                    state_size=4),
        **_COMMON,
    )
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION, no_decay=(r".*/A_log", r".*/D")
)
