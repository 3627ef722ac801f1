"""Attention-free mixers of tokens, as github.com/satwik77/incontext-bool (MIT) has them.

Each is a module `(x, state, train, context) -> (y, state)` for `zoo.layers.decoder.run_blocks`; y
has x's shape. A prompt has no padding, so that the context says nothing.

    Retention       Sun et al., arXiv 2307.08621: attention with decay in place of softmax
    HyenaOperator   Poli et al., arXiv 2302.10866: gates between long convolutions
    DiagonalSSM     Gupta et al., arXiv 2203.14343: a state space whose matrix is diagonal

What that code leaves out of the papers is left out here: retention has no rotary positions, no
scale and no group normalisation (whose parameters its files hold nevertheless).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

import kernels_pallas
from zoo.layers.causal import Context
from zoo.layers.dense import Dense
from zoo.layers.mlp import gelu
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import torch_linear

xavier = nn.initializers.xavier_uniform()


class Retention(nn.Module):
    """`out(silu(g) * sum over m <= t of gamma^(t-m) (q_t . k_m) v_m)`, by heads.

    Head h forgets with `gamma = 1 - 2^(-5-h)`. `idle_norm` is not applied: published files have it.

    Attributes:
      num_heads: must divide the channels.
      gated: whether the output is gated; without, the map of the gate is kept unused.
    """

    num_heads: int
    gated: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def init_state(
        self, batch: int, channels: int
    ) -> Float[Array, "batch heads head_dim head_dim"]:
        """Nothing retained."""
        head_dim = channels // self.num_heads
        return jnp.zeros((batch, self.num_heads, head_dim, head_dim))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: Float[Array, "batch heads head_dim head_dim"] | None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], Array | None]:
        batch, length, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide {channels} channels.")
        dense = partial(Dense, kernel_init=xavier, dtype=self.dtype, param_dtype=self.param_dtype)
        heads = (batch, length, self.num_heads, channels // self.num_heads)
        query, key, value = (
            constrain(t.reshape(heads), "batch", "length", "heads", "head_dim")
            for t in jnp.split(dense(3 * channels, name="qkv")(x), 3, axis=-1)
        )
        gate = dense(channels, name="gate")(x)
        for name, start in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros)):
            self.param(f"idle_norm_{name}", start, (channels,), self.param_dtype)
        decay = np.log1p(-(2.0 ** (-5 - np.arange(self.num_heads)))).astype(np.float32)
        y, after = kernels_pallas.gated_linear_attention(
            query,
            key,
            value,
            jnp.broadcast_to(decay[:, None], (*heads[:3], 1)),
            scale=1.0,
            initial_state=state,
        )
        y = y.reshape(x.shape)
        y = y * nn.silu(gate) if self.gated else y
        return dense(channels, name="out")(y), None if state is None else after


def causal_convolution(
    x: Float[Array, "batch length channels"], kernel: Float[Array, "length channels"]
) -> Float[Array, "batch length channels"]:
    """Each channel convolved with its kernel over all that came before, by FFT, in float32."""
    length = x.shape[1]
    transformed = jnp.fft.rfft(x.astype(jnp.float32), 2 * length, axis=1)
    kernel = jnp.fft.rfft(kernel.astype(jnp.float32), 2 * length, axis=0)
    return jnp.fft.irfft(transformed * kernel, 2 * length, axis=1)[:, :length]


def filter_positions(length: int, bands: int = 4) -> Float[np.ndarray, "length 2*bands+1"]:
    """Time from 0 to 1, and the real and imaginary parts of `exp(-i f w)` in `bands` bands."""
    time = np.linspace(0, 1, length, dtype=np.float32)[:, None]
    angle = 2 * np.pi * np.arange(length, dtype=np.float32)[:, None] / length
    angle = angle * np.linspace(1e-4, bands - 1, bands, dtype=np.float32)
    return np.concatenate([time, np.cos(angle), -np.sin(angle)], 1).astype(np.float32)


def filter_decays(channels: int) -> Float[np.ndarray, "channels"]:
    """How fast the filter of each channel falls, from slow to fast (they are negative)."""
    slow, fast = np.log(1e-2) / 1.5, np.log(1e-2) / 0.3
    return np.linspace(slow, fast, channels, dtype=np.float32)


class ImplicitFilter(nn.Module):
    """Filters of `channels` that a multilayer perceptron with sines makes from time.

    Attributes:
      channels: filters.
      max_tokens: the longest filter.
      width: of the perceptron.
      depth: of its hidden maps after the first; one frequency serves all sines.
      bands: of the sinusoids of time, which are trained.
    """

    channels: int
    max_tokens: int = 200
    width: int = 64
    depth: int = 3
    bands: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "length channels"]:
        start = lambda *_: jnp.asarray(  # noqa: E731
            filter_positions(self.max_tokens, self.bands), self.param_dtype
        )
        positions = self.param("positions", start, (self.max_tokens, 2 * self.bands + 1))
        frequency = self.param("frequency", nn.initializers.ones, (self.width,), self.param_dtype)
        h = positions[:length].astype(jnp.float32)
        for i in range(self.depth + 1):
            h = jnp.sin(frequency * torch_linear(self, self.width, h.shape[-1], f"dense_{i}")(h))
        last = Dense(
            self.channels,
            use_bias=False,
            kernel_init=torch_default_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="last",
        )
        h = last(h)
        time = np.linspace(0, 1, self.max_tokens, dtype=np.float32)[:length, None]
        return h * jnp.exp(-time * np.abs(filter_decays(self.channels)))


class HyenaOperator(nn.Module):
    """`order - 1` long convolutions with a gate before each, and one behind the last.

    Attributes:
      order: gates; at least 2.
      max_tokens: longest sequence.
    """

    order: int = 3
    max_tokens: int = 200
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], None]:
        if self.order < 2:
            raise ValueError(f"order={self.order}, but Hyena has at least 2 gates.")
        length, channels = x.shape[1:]
        u = torch_linear(self, (self.order + 1) * channels, channels, "in_proj")(x)
        short = nn.Conv(
            u.shape[-1],
            (3,),
            padding=((2, 0),),
            feature_group_count=u.shape[-1],
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="short_conv",
        )
        *gates, v = jnp.split(short(u), self.order + 1, axis=-1)
        width = (self.order - 1) * channels
        kernels = ImplicitFilter(
            width, self.max_tokens, param_dtype=self.param_dtype, name="filter"
        )(length)
        skip = self.param("skip", nn.initializers.normal(1.0), (width,), self.param_dtype)
        kernels, skips = (jnp.split(t, self.order - 1, -1) for t in (kernels, skip))
        for gate, kernel, skip in zip(gates[:0:-1], kernels, skips, strict=True):
            v = v * gate
            v = (causal_convolution(v, kernel) + v * skip).astype(self.dtype)
        return torch_linear(self, channels, channels, "out")(v * gates[0]), None


def skew_hippo_eigenvalues(modes: int) -> Complex[np.ndarray, "modes"]:
    """Eigenvalues with positive imaginary parts of the skew half of HiPPO, largest first, - 1/2."""
    odd = 2 * np.arange(2 * modes) + 1.0
    lower = np.tril(np.sqrt(odd[:, None] * odd), -1)
    values = np.linalg.eigvals((lower - lower.T) / 2)
    return values[np.argsort(-values.imag)][:modes] - 0.5


def _start_modes(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    values = skew_hippo_eigenvalues(shape[0])
    return jnp.asarray(np.stack([values.real, values.imag], 1), dtype)


def _start_steps(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    low, high = np.log(1e-3), np.log(1e-1)
    each = jax.random.uniform(key, (shape[0], 1), dtype, low, high)
    return jnp.broadcast_to(each, shape)


def reciprocal(x: Complex[Array, "*shape"], epsilon: float = 1e-7) -> Complex[Array, "*shape"]:
    """`1 / x`, bounded where x is near 0."""
    return jnp.conj(x) / (jnp.real(x * jnp.conj(x)) + epsilon)


class DiagonalSSM(nn.Module):
    """A convolution whose kernel is a sum of `modes` complex exponentials, normalised by softmax.

        K_l = Re sum_n W_n softmax over l of (l dt L_n) / L_n
        y = out(gelu(K * x + D x))

    The real and the imaginary part of L have steps dt of their own, for each channel.
    """

    modes: int = 64
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], None]:
        channels, types = x.shape[-1], self.param_dtype
        normal = nn.initializers.normal(1.0)
        log_dt = self.param("log_dt", _start_steps, (channels, 2), types)
        modes = self.param("modes", _start_modes, (self.modes, 2), types)
        weight = self.param("weight", normal, (channels, self.modes, 2), types)
        skip = self.param("skip", normal, (channels,), types)
        kernel = ssm_kernel(log_dt, modes, weight, x.shape[1])
        y = causal_convolution(x, kernel) + x.astype(jnp.float32) * skip
        y = gelu(y).astype(self.dtype)
        return torch_linear(self, channels, channels, "out")(y), None


def ssm_kernel(
    log_dt: Float[Array, "channels 2"],
    modes: Float[Array, "modes 2"],
    weight: Float[Array, "channels modes 2"],
    length: int,
) -> Float[Array, "length channels"]:
    """The kernel of `DiagonalSSM`; no exponent is positive.

    A mode that grows is counted from the end, where it is largest, and its geometric series is
    that of the mode that falls as fast.
    """
    eigenvalue = jax.lax.complex(modes[:, 0], modes[:, 1])
    weight = jax.lax.complex(weight[..., 0], weight[..., 1])
    scaled = jnp.exp(log_dt)[:, None] * modes
    scaled = jax.lax.complex(scaled[..., 0], scaled[..., 1])
    grows = modes[:, 0] > 0
    steps = jnp.arange(length, dtype=jnp.float32)
    last = jax.lax.stop_gradient(scaled * grows) * (length - 1)
    exponents = scaled[..., None] * steps - last[..., None]
    falling = jnp.where(grows, -scaled, scaled)
    ratio = (jnp.exp(falling) - 1) * reciprocal((jnp.exp(falling * length) - 1) * eigenvalue)
    return jnp.einsum("cn,cnl->lc", weight * ratio, jnp.exp(exponents)).real
