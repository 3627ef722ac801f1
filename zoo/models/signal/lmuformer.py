"""LMUFormer: a memory with one scalar input, convolutions around it, and a spiking version.

Liu et al., "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units", ICLR
2024, arXiv 2402.04882. Official code: github.com/zeyuliu1037/LMUFormer (MIT), which we follow.
With x_t the frame at time t:

    u_t = relu(w x_t + b)              one number a frame
    m_t = A m_{t-1} + B u_t            Legendre memory: d polynomials of the last theta frames of u
    h_t = relu(W [m_t; x_t] + c)
    block:  x = x + norm(out(h));  x = x + mlp(x);  every norm is a BatchNorm

A and B are fixed. In training m is a causal convolution of u with A^t B, by FFT; in streaming it is
the recurrence. `spiking` puts BatchNorm and leaky integrate-and-fire neurons (`lif`) in place of
the activations, in front of the maps; their time is that of the series, and d is twice the width.
The rate-coded network ends its MLP in a ReLU behind the norm, as the official code does.

The official code stores A^t B for 128 frames and fails for other lengths; here any length will do.
Its recurrent form of the spiking network runs the whole prefix again at each frame and leaves out
the spikes of m; ours is a step of constant memory that equals the parallel form. Convolutions look
one frame ahead, so that `stream` is late by `DELAY` = 5 frames.

    features       lmuformer_gsc
    embed          128  256
    memory1        128  256    output of the first block's memory
    block1         128  256
    prefix_logits  128  35     had the series ended here
    logits         35
"""

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float

from zoo.checkpoints.rules import Rule, Rules, conv, dense_rules, norm_rules
from zoo.layers.mlp import gelu
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init, pointwise
from zoo.registry import Variant

DELAY = 5  # frames: one for each convolution of the embedding
init = nn.initializers.truncated_normal(0.02)  # of Linear, in the official code
State = Mapping[str, Any] | None


# --------------------------------------------------------------------------------- memory


@functools.cache
def legendre(order: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """A `[order, order]` and B `[order]` of the delay of `theta` frames, held for one, float32."""
    i, j = np.indices((order, order))
    rate = (2 * i + 1) / theta
    continuous = np.zeros((order + 1, order + 1))
    continuous[:-1, :-1] = rate * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    continuous[:-1, -1] = rate[:, 0] * (-1.0) ** i[:, 0]
    held = scipy.linalg.expm(continuous).astype(np.float32)
    return held[:-1, :-1], held[:-1, -1]


@functools.cache
def impulse_response(order: int, theta: float, length: int) -> np.ndarray:
    """A^t B for t below `length`: `[order, length]`, float32."""
    A, column = (x.astype(np.float64) for x in legendre(order, theta))
    columns = [column]
    for _ in range(length - 1):
        columns.append(A @ columns[-1])
    return np.stack(columns, -1).astype(np.float32)


def remember(
    u: Float[Array, "batch length"], order: int, theta: float
) -> Float[Array, "batch length order"]:
    """The memory after each frame, from an empty one: a causal convolution, by FFT."""
    length = u.shape[1]
    response = jnp.fft.rfft(impulse_response(order, theta, length), 2 * length)
    spectrum = jnp.fft.rfft(u.astype(jnp.float32), 2 * length)
    memory = jnp.fft.irfft(spectrum[:, None] * response, 2 * length)[..., :length]
    return memory.swapaxes(1, 2)


def remember_step(
    memory: Float[Array, "batch order"], u: Float[Array, "batch"], theta: float
) -> Float[Array, "batch order"]:
    """The memory after one more frame."""
    A, B = legendre(memory.shape[-1], theta)
    product = partial(jnp.einsum, precision="highest")
    return product("bj,ij->bi", memory, A) + u.astype(jnp.float32)[:, None] * B


def readout(order: int, delay: float) -> np.ndarray:
    """Weights of the memory that give back u as it was `delay` * theta frames ago, in [0, 1]."""
    return np.polynomial.legendre.legvander(np.array([2.0 * delay - 1.0]), order - 1)[0]


# --------------------------------------------------------------------------------- spikes


@jax.custom_jvp
def spike(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 where x >= 0, else 0; its derivative is that of sigmoid(4 x)."""
    return (x >= 0).astype(x.dtype)


@spike.defjvp
def _surrogate(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    s = jax.nn.sigmoid(4.0 * primals[0])
    return spike(*primals), 4.0 * s * (1.0 - s) * tangents[0]


def lif(
    x: Float[Array, "batch length channels"],
    potential: Float[Array, "batch channels"] | None = None,
    real: Bool[Array, "length"] | None = None,
    threshold: float = 1.0,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch channels"]]:
    """Leaky integrate-and-fire neurons: the spikes, and the potentials at the end.

    v += (x - v) / 2; a spike where v >= threshold, which sets v to 0 (no gradient flows through
    that).

    Args:
      x: input current.
      potential: at the start; None: zero.
      real: frames that count; the potential stays as it is in the others.
      threshold: of the potential.
    """
    current = x.astype(jnp.float32).swapaxes(0, 1)
    potential = jnp.zeros_like(current[0]) if potential is None else potential
    real = jnp.ones(len(current), bool) if real is None else real

    def step(v: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        charged = v + (now[0] - v) / 2
        fired = spike(charged - threshold)
        return jnp.where(now[1], charged * (1 - jax.lax.stop_gradient(fired)), v), fired

    potential, spikes = jax.lax.scan(step, potential, (current, real))
    return spikes.swapaxes(0, 1).astype(x.dtype), potential


class Fire(nn.Module):
    """BatchNorm, then neurons."""

    threshold: float = 1.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, potential: Array | None, real: Array | None, train: bool
    ) -> tuple[Array, Array]:
        x = _norm(self)("norm", x, train)
        return lif(x, potential, real, self.threshold)


# --------------------------------------------------------------------------------- blocks


def _types(module: nn.Module) -> dict[str, Any]:
    return {"dtype": module.dtype, "param_dtype": module.param_dtype}


def _norm(module: nn.Module) -> Any:
    """`(name, x, train) -> BatchNorm(x)` with the types of the module."""

    def norm(name: str, x: Array, train: bool) -> Array:
        layer = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name=name, **_types(module))
        return layer(x, use_running_average=not train)

    return norm


def _at(state: State, name: str) -> Any:
    return None if state is None else state[name]


def _frames(real: Array | None, delay: int, length: int) -> Array | None:
    """Which frames are real at a place that is `delay` convolutions late."""
    return None if real is None else real[DELAY - delay :][:length]


class TimeConv(nn.Module):
    """Convolution over three frames, none added; the kernel is `[3, variates, channels]`.

    One matrix product of the three side by side: in a loop, a CPU is slow at convolutions.
    """

    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length+2 variates"]
    ) -> Float[Array, "batch length channels"]:
        shape = (3, x.shape[-1], self.channels)
        kernel = self.param("kernel", torch_default_init, shape, self.param_dtype)
        length = x.shape[1] - 2
        x = jnp.concatenate([x[:, i : i + length] for i in range(3)], -1)
        return x @ kernel.astype(self.dtype).reshape(-1, self.channels)


class Embed(nn.Module):
    """Four convolutions over three frames, then `x + conv(x)`."""

    channels: int
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length variates"], state: State, real: Array | None,
        train: bool,
    ) -> tuple[Float[Array, "batch length channels"], dict[str, Array]]:  # fmt: skip
        kept = {}
        length = x.shape[1]

        def convolve(i: int, x: Array) -> Array:
            if real is not None:
                x = jnp.where(_frames(real, i, length)[:, None], x, 0)
            past = _at(state, f"past{i}")
            x = jnp.pad(x, ((0, 0), (1, 1), (0, 0))) if past is None else _append(past, x)
            kept[f"past{i}"] = x[:, -2:].astype(jnp.float32)
            return TimeConv(self.channels, name=f"conv{i}", **_types(self))(x)

        def fire(i: int, x: Array) -> Array:
            layer = Fire(name=f"fire{i}", **_types(self))
            frames = _frames(real, i + 1, length)
            x, kept[f"fire{i}"] = layer(x, _at(state, f"fire{i}"), frames, train)
            return x

        x = x.astype(self.dtype)
        for i in range(3):
            x = convolve(i, x)
            x = fire(i, x) if self.spiking else _norm(self)(f"norm{i}", nn.relu(x), train)
        x = convolve(3, x)
        x = x if self.spiking else _norm(self)("norm3", nn.relu(x), train)
        ahead = convolve(4, fire(3, x) if self.spiking else x)
        if state is not None:
            x = _append(state["late"], x)
        kept["late"] = x[:, -1:].astype(jnp.float32)
        return x[:, :length] + ahead, kept


def _append(past: Array, x: Array) -> Array:
    return jnp.concatenate([past.astype(x.dtype), x], 1)


class Memory(nn.Module):
    """The Legendre memory and the map of it and the input; then `out` and BatchNorm."""

    theta: float
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: State, real: Array | None,
        train: bool,
    ) -> tuple[Float[Array, "batch length channels"], dict[str, Array]]:  # fmt: skip
        channels, kept = x.shape[-1], {}
        dense = partial(nn.Dense, kernel_init=init, **_types(self))

        def fire(name: str, x: Array, otherwise: Any, threshold: float = 1.0) -> Array:
            if not self.spiking:
                return otherwise(x)
            layer = Fire(threshold, name=name, **_types(self))
            x, kept[name] = layer(x, _at(state, name), real, train)
            return x

        x = fire("fire_x", x, lambda x: x, 0.5)
        u = fire("fire_u", dense(1, name="write")(x), nn.relu)[..., 0]
        if state is None:
            memory = remember(u, memory_size(channels, self.spiking), self.theta)
        else:
            memory, kept["memory"] = self.recur(state["memory"], u, real)
        memory = fire("fire_m", memory.astype(self.dtype), lambda m: m)
        h = dense(channels, name="read")(jnp.concatenate([memory, x], -1))
        h = fire("fire_h", h, nn.relu)
        conv = partial(nn.Dense, kernel_init=torch_default_init, bias_init=bias_init(channels))
        x = _norm(self)("norm", conv(channels, name="out", **_types(self))(h), train)
        return constrain(x, "batch", "length", "channels"), kept

    def recur(self, memory: Array, u: Array, real: Array) -> tuple[Array, Array]:
        """The memory after each frame, and at the end."""

        def step(memory: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            after = remember_step(memory, now[0], self.theta)
            memory = jnp.where(now[1], after, memory)
            return memory, memory

        last, memories = jax.lax.scan(step, memory, (u.T, real))
        return memories.swapaxes(0, 1), last


class Mlp(nn.Module):
    """Two maps of each frame with BatchNorms; rate-coded: GELU between, ReLU at the end."""

    hidden: int
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: State, real: Array | None,
        train: bool,
    ) -> tuple[Float[Array, "batch length channels"], dict[str, Array]]:  # fmt: skip
        kept, norm = {}, _norm(self)
        for i, (name, width, act) in enumerate(
            (("up", self.hidden, gelu), ("down", x.shape[-1], nn.relu)), 1
        ):
            if self.spiking:
                layer = Fire(name=f"fire{i}", **_types(self))
                x, kept[f"fire{i}"] = layer(x, _at(state, f"fire{i}"), real, train)
            dense = partial(nn.Dense, kernel_init=torch_default_init, **_types(self))
            x = dense(width, bias_init=bias_init(x.shape[-1]), name=name)(x)
            x = x if self.spiking else act(norm(f"norm{i}", x, train))
            x = constrain(x, "batch", "length", "mlp" if name == "up" else "channels")
        return x, kept


class Block(nn.Module):
    """Memory, then MLP, each added to its input."""

    mlp_ratio: float
    theta: float
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: State, real: Array | None,
        train: bool,
    ) -> tuple[tuple[Array, Array], dict[str, dict[str, Array]]]:  # fmt: skip
        fields = {"spiking": self.spiking, **_types(self)}
        memory = Memory(self.theta, name="memory", **fields)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), name="mlp", **fields)
        y, kept_memory = memory(x, _at(state, "memory"), real, train)
        x = x + y
        z, kept_mlp = mlp(x, _at(state, "mlp"), real, train)
        return (y, x + z), {"memory": kept_memory, "mlp": kept_mlp}


def memory_size(channels: int, spiking: bool) -> int:
    """Polynomials of the memory."""
    return channels * (2 if spiking else 1)


class LMUFormer(nn.Module):
    """LMUFormer classifier of series.

    Attributes:
      context_length: frames of a series; others may come, this is what published files store
        A^t B for.
      variates: numbers of a frame (mel bands).
      theta: frames that the memory holds.
      spiking: neurons in place of activations.
    """

    context_length: int = 128
    variates: int = 128
    num_classes: int = 35
    embed_dim: int = 256
    depth: int = 1
    mlp_ratio: float = 4.0
    theta: float = 128.0
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, series: Float[Array, "batch length variates"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.features(series, train)["logits"]

    def features(
        self, series: Float[Array, "batch length variates"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above)."""
        return self.run(series, None, None, train)[0]

    def init_state(self, batch: int) -> dict[str, Any]:
        """What `stream` starts from: no frame seen."""
        c, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        d = memory_size(c, self.spiking)
        channels = [self.variates, c, c, c, c]
        embed = {f"past{i}": (2, width) for i, width in enumerate(channels)} | {"late": (1, c)}
        memory, mlp = {"memory": (d,)}, {}
        if self.spiking:
            embed |= {f"fire{i}": (c,) for i in range(4)}
            memory |= {"fire_x": (c,), "fire_u": (1,), "fire_m": (d,), "fire_h": (c,)}
            mlp |= {"fire1": (c,), "fire2": (hidden,)}
        shapes = {
            "embed": embed,
            "layers": [{"memory": memory, "mlp": mlp} for _ in range(self.depth)],
            "total": (c,),
        } | ({"fire": (c,)} if self.spiking else {})
        is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
        state = jax.tree.map(lambda s: jnp.zeros((batch, *s)), shapes, is_leaf=is_shape)
        return state | {"real": jnp.zeros(DELAY, bool), "count": jnp.zeros((), jnp.int32)}

    def stream(
        self,
        state: dict[str, Any],
        frames: Float[Array, "batch length variates"],
        real: bool | Bool[Array, "length"] = True,
    ) -> tuple[dict[str, Any], Float[Array, "batch classes"]]:
        """Goes on with a series; any number of frames at once.

        Args:
          state: of `init_state`, or what `stream` gave.
          frames: the next ones.
          real: False for frames behind the end: `DELAY` of them get the last real ones out.

        Returns:
          The new state; logits of all frames but the last `DELAY` given. In the beginning, when
          there are none, those of a series of zeros.
        """
        out, state = self.run(frames, state, jnp.broadcast_to(real, frames.shape[1:2]), False)
        return state, out["logits"]

    def step(
        self,
        state: dict[str, Any],
        frame: Float[Array, "batch variates"],
        real: bool | Array = True,
    ) -> tuple[dict[str, Any], Float[Array, "batch classes"]]:
        """`stream` with one frame."""
        return self.stream(state, frame[:, None], real)

    @nn.compact
    def run(
        self, series: Array, state: dict[str, Any] | None, real: Array | None, train: bool
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """The parallel form, or the streaming form from a state: features and the new state."""
        if series.ndim != 3 or series.shape[2] != self.variates:
            raise ValueError(
                f"This LMUFormer takes series of shape (batch, length, {self.variates}), not "
                f"{series.shape}; give frames of that width, or create it with another variates."
            )
        fields = {"spiking": self.spiking, **_types(self)}
        length = series.shape[1]
        if real is not None:
            real = jnp.concatenate([state["real"], real])
        embed = Embed(self.embed_dim, name="embed", **fields)
        x, kept = embed(series, _at(state, "embed"), real, train)
        new, out = {"embed": kept, "layers": []}, {"embed": x}
        frames = _frames(real, DELAY, length)
        for i in range(self.depth):
            block = Block(self.mlp_ratio, self.theta, name=f"layers_{i}", **fields)
            past = None if state is None else state["layers"][i]
            (out[f"memory{i + 1}"], x), kept = block(x, past, frames, train)
            out[f"block{i + 1}"] = x
            new["layers"].append(kept)
        if self.spiking:
            fire = Fire(name="fire", **_types(self))
            x, new["fire"] = fire(x, _at(state, "fire"), frames, train)
        head = nn.Dense(self.num_classes, kernel_init=init, name="head", **_types(self))
        x = x.astype(jnp.float32)
        if state is None:
            steps = jnp.arange(1, length + 1)[:, None]
            out["prefix_logits"] = head(jnp.cumsum(x, 1) / steps).astype(jnp.float32)
            out["logits"] = head(x.mean(1))
            return out, new
        new["real"] = real[-DELAY:]
        new["count"] = state["count"] + frames.sum()
        new["total"] = state["total"] + jnp.where(frames[:, None], x, 0).sum(1)
        out["logits"] = head(new["total"] / jnp.maximum(new["count"], 1))
        return out, new


# ---------------------------------------------------------------------------- checkpoints

# (norm of the official code, ours), of the rate-coded and of the spiking network
_NORMS = (
    [(f"patch_embed.conv_layers.{i}.3", f"embed/norm{i}") for i in range(4)]
    + [
        ("block.{i}.mlp.fc1_bn", "layers_{i}/mlp/norm1"),
        ("block.{i}.mlp.fc2_bn", "layers_{i}/mlp/norm2"),
    ],
    [(f"patch_embed.proj_bn{i or ''}", f"embed/fire{i}/norm") for i in range(4)]
    + [
        ("block.{i}.attn.prev_bn", "layers_{i}/memory/fire_x/norm"),
        ("block.{i}.attn.lmu.bn_u", "layers_{i}/memory/fire_u/norm"),
        ("block.{i}.attn.lmu.bn_m", "layers_{i}/memory/fire_m/norm"),
        ("block.{i}.attn.lmu.bn_h", "layers_{i}/memory/fire_h/norm"),
        ("block.{i}.mlp.fc1_bn", "layers_{i}/mlp/fire1/norm"),
        ("block.{i}.mlp.fc2_bn", "layers_{i}/mlp/fire2/norm"),
        ("head_bn", "fire/norm"),
    ],
)
_MEMORY_NORM = ("block.{i}.attn.proj_bn", "layers_{i}/memory/norm")


def _batch_norm(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm_rules(theirs, ours),
        Rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
    ]


def _pointwise(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", pointwise),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def _system(name: str, model: LMUFormer, i: int) -> np.ndarray:
    """A tensor that the official memory stores: A, B, A^t B or the transform of that."""
    order = memory_size(model.embed_dim, model.spiking)
    if name == "A":
        return legendre(order, model.theta)[0]
    if name == "B":
        return legendre(order, model.theta)[1][:, None]
    response = impulse_response(order, model.theta, model.context_length)
    if name == "H":
        return response
    return np.fft.rfft(response, 2 * model.context_length).astype(np.complex64)


def _rules(spiking: bool, prefix: str = "") -> Rules:
    norms = [*_NORMS[spiking], _MEMORY_NORM]
    rules = [rule for theirs, ours in norms for rule in _batch_norm(prefix + theirs, ours)]
    for i in range(4):
        theirs = f"proj_conv{i or ''}" if spiking else f"conv_layers.{i}.0"
        source = f"{prefix}patch_embed.{theirs}.weight"
        rules.append(Rule(source, f"embed/conv{i}/kernel", conv))
    rules.append(Rule(f"{prefix}patch_embed.rpe_conv.weight", "embed/conv4/kernel", conv))
    block, layer = f"{prefix}block.{{i}}", "layers_{i}"
    rules += [
        *dense_rules(f"{block}.attn.lmu.W_u", f"{layer}/memory/write"),
        *dense_rules(f"{block}.attn.lmu.W_h", f"{layer}/memory/read"),
        *_pointwise(f"{block}.attn.proj_conv", f"{layer}/memory/out"),
        *_pointwise(f"{block}.mlp.fc1_conv", f"{layer}/mlp/up"),
        *_pointwise(f"{block}.mlp.fc2_conv", f"{layer}/mlp/down"),
        *dense_rules(f"{prefix}head", "head"),
    ]
    counter = lambda model, **_: np.zeros((), np.int64)  # noqa: E731
    derived = {f"{prefix}{theirs}.num_batches_tracked": counter for theirs, _ in norms}
    derived |= {f"{block}.attn.lmu.{n}": partial(_system, n) for n in ("A", "B", "H", "fft_H")}
    return Rules(rules, derived=derived, fresh=("head/kernel", "head/bias"))


CHECKPOINT = {
    "official": _rules(False),
    "spiking": _rules(True),
    "data_parallel": _rules(False, "module."),
    "spiking_data_parallel": _rules(True, "module."),
}

# ------------------------------------------------------------------------------- variants


def _variant(params: int | None, accuracy: float | None, **fields: Any) -> Variant:
    return Variant(
        module=LMUFormer,
        fields=fields,
        task="series_classification",
        params=params,
        metric=f"Speech Commands v2 (35 words) {accuracy} %" if accuracy else "",
        paper="LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units, "
        "arXiv 2402.04882",
        code="github.com/zeyuliu1037/LMUFormer",
        licence="MIT",
    )


VARIANTS = {
    "lmuformer_gsc": _variant(1_621_796, 96.53),
    "lmuformer_spiking_gsc": _variant(1_689_894, 96.12, spiking=True),
    "lmuformer_test": _variant(
        None, None, context_length=32, variates=6, num_classes=5, embed_dim=24, theta=32.0
    ),
}
