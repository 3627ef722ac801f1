"""What the networks of LMUFormer's repository are made of: memory, neurons, convolutions, MLP.

See `zoo.models.signal.lmuformer` for the paper and what each part computes.
"""

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.checkpoints.rules import Rule, dense_rules
from zoo.layers.mlp import gelu
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init, pointwise

DELAY = 5  # frames: one for each convolution of the embedding
init = nn.initializers.truncated_normal(0.02)  # of Linear, in the official code
State = Mapping[str, Any] | None


# --------------------------------------------------------------------------------- memory


@functools.cache
def legendre(order: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """A `[order, order]` and B `[order]` of the delay of `theta` frames, held for one, float32."""
    import scipy.linalg  # a sixth of the time of `zoo list`, if it were imported with the file

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


def memory_size(channels: int, spiking: bool) -> int:
    """Polynomials of the memory."""
    return channels * (2 if spiking else 1)


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
    valid: Bool[Array, "length"] | None = None,
    threshold: float = 1.0,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch channels"]]:
    """Leaky integrate-and-fire neurons: the spikes, and the potentials at the end.

    v += (x - v) / 2; a spike where v >= threshold, which sets v to 0 (no gradient flows through
    that).

    Args:
      x: input current.
      potential: at the start; None: zero.
      valid: frames that count; the potential stays as it is in the others.
      threshold: of the potential.
    """
    current = x.astype(jnp.float32).swapaxes(0, 1)
    potential = jnp.zeros_like(current[0]) if potential is None else potential
    valid = jnp.ones(current.shape[0], bool) if valid is None else valid

    def step(v: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        charged = v + (now[0] - v) / 2
        fired = spike(charged - threshold)
        return jnp.where(now[1], charged * (1 - jax.lax.stop_gradient(fired)), v), fired

    potential, spikes = jax.lax.scan(step, potential, (current, valid))
    return spikes.swapaxes(0, 1).astype(x.dtype), potential


class Fire(nn.Module):
    """BatchNorm, then neurons."""

    threshold: float = 1.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, potential: Array | None, valid: Array | None, train: bool
    ) -> tuple[Array, Array]:
        x = batch_norm(self)("norm", x, train)
        return lif(x, potential, valid, self.threshold)


# --------------------------------------------------------------------------------- blocks


def types_of(module: nn.Module) -> dict[str, Any]:
    """The number types of a module, for those it makes."""
    return {"dtype": module.dtype, "param_dtype": module.param_dtype}


def batch_norm(module: nn.Module) -> Any:
    """`(name, x, train) -> BatchNorm(x)` with the types of the module."""

    def norm(name: str, x: Array, train: bool) -> Array:
        layer = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name=name, **types_of(module))
        return layer(x, use_running_average=not train)

    return norm


def entry(state: State, name: str) -> Any:
    """A part of a streaming state; None in the parallel form."""
    return None if state is None else state[name]


def frames_at(valid: Array | None, delay: int, length: int) -> Array | None:
    """Which frames are valid at a place that is `delay` convolutions late."""
    return None if valid is None else valid[DELAY - delay :][:length]


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
        self, x: Float[Array, "batch length variates"], state: State, valid: Array | None,
        train: bool,
    ) -> tuple[Float[Array, "batch length channels"], dict[str, Array]]:  # fmt: skip
        kept = {}
        length = x.shape[1]

        def convolve(i: int, x: Array) -> Array:
            if valid is not None:
                x = jnp.where(frames_at(valid, i, length)[:, None], x, 0)
            past = entry(state, f"past{i}")
            x = jnp.pad(x, ((0, 0), (1, 1), (0, 0))) if past is None else _append(past, x)
            kept[f"past{i}"] = x[:, -2:].astype(jnp.float32)
            return TimeConv(self.channels, name=f"conv{i}", **types_of(self))(x)

        def fire(i: int, x: Array) -> Array:
            layer = Fire(name=f"fire{i}", **types_of(self))
            frames = frames_at(valid, i + 1, length)
            x, kept[f"fire{i}"] = layer(x, entry(state, f"fire{i}"), frames, train)
            return x

        x = x.astype(self.dtype)
        for i in range(3):
            x = convolve(i, x)
            x = fire(i, x) if self.spiking else batch_norm(self)(f"norm{i}", nn.relu(x), train)
        x = convolve(3, x)
        x = x if self.spiking else batch_norm(self)("norm3", nn.relu(x), train)
        ahead = convolve(4, fire(3, x) if self.spiking else x)
        if state is not None:
            x = _append(state["late"], x)
        kept["late"] = x[:, -1:].astype(jnp.float32)
        return x[:, :length] + ahead, kept


def _append(past: Array, x: Array) -> Array:
    return jnp.concatenate([past.astype(x.dtype), x], 1)


class Mlp(nn.Module):
    """Two maps of each frame with BatchNorms; rate-coded: GELU between, ReLU at the end."""

    hidden: int
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: State, valid: Array | None,
        train: bool,
    ) -> tuple[Float[Array, "batch length channels"], dict[str, Array]]:  # fmt: skip
        kept, norm = {}, batch_norm(self)
        for i, (name, width, act) in enumerate(
            (("up", self.hidden, gelu), ("down", x.shape[-1], nn.relu)), 1
        ):
            if self.spiking:
                layer = Fire(name=f"fire{i}", **types_of(self))
                x, kept[f"fire{i}"] = layer(x, entry(state, f"fire{i}"), valid, train)
            dense = partial(nn.Dense, kernel_init=torch_default_init, **types_of(self))
            x = dense(width, bias_init=bias_init(x.shape[-1]), name=name)(x)
            x = x if self.spiking else act(norm(f"norm{i}", x, train))
            x = constrain(x, "batch", "length", "mlp" if name == "up" else "channels")
        return x, kept


def read_out(
    head: Any, x: Float[Array, "batch length channels"]
) -> dict[str, Float[Array, "batch ... classes"]]:
    """`logits` of the mean over all frames, and `prefix_logits`: had the series ended at each."""
    x = x.astype(jnp.float32)
    steps = jnp.arange(1, x.shape[1] + 1)[:, None]
    prefixes = head(jnp.cumsum(x, 1) / steps).astype(jnp.float32)
    return {"prefix_logits": prefixes, "logits": head(x.mean(1))}


# ---------------------------------------------------------------------------- checkpoints


def pointwise_rules(theirs: str, ours: str) -> list[Rule]:
    """Those of a convolution of width 1."""
    return dense_rules(theirs, ours, pointwise)


def stored_system(name: str, order: int, theta: float, length: int) -> np.ndarray:
    """A tensor that the official memory stores: A, B, A^t B (H) or the transform of that."""
    if name == "A":
        return legendre(order, theta)[0]
    if name == "B":
        return legendre(order, theta)[1][:, None]
    response = impulse_response(order, theta, length)
    return response if name == "H" else np.fft.rfft(response, 2 * length).astype(np.complex64)
