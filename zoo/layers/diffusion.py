"""What diffusion transformers share: the features of a noise level, and norms that it modulates."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.layers.dense import Dense
from zoo.layers.norm import LayerNorm

PlainNorm = partial(LayerNorm, epsilon=1e-6, use_scale=False, use_bias=False)
"""LayerNorm without parameters: `modulate` gives scale and shift."""


def time_features(
    times: Float[Array, "batch"], channels: int = 256
) -> Float[Array, "batch channels"]:
    """`[cos(t f), sin(t f)]` with frequencies `f = 10000^(-i / half)`, float32 (ADM, DiT)."""
    half = channels // 2
    rates = np.exp(np.float32(-np.log(10000.0)) * np.arange(half, dtype="f") / np.float32(half))
    angles = jnp.asarray(times, jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def sincos(positions: Float[np.ndarray, "length"], channels: int) -> np.ndarray:
    """`[sin(p f), cos(p f)]` with frequencies `f = 10000^(-i / half)`, float64 (MAE's tables)."""
    rates = 10000.0 ** (-np.arange(channels // 2) / (channels / 2.0))
    angles = np.outer(np.asarray(positions, np.float64).reshape(-1), rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def grid_positions(
    size: tuple[int, int], channels: int, scale: float = 1.0
) -> Float[np.ndarray, "tokens channels"]:
    """Fixed positions of a row-major grid: half the channels for the column, half for the row."""
    rows, columns = np.divmod(np.arange(size[0] * size[1]), size[1])
    return np.concatenate([sincos(at / scale, channels // 2) for at in (columns, rows)], -1)


def modulate(
    x: Float[Array, "batch *length channels"],
    shift: Float[Array, "batch *length channels"],
    scale: Float[Array, "batch *length channels"],
) -> Float[Array, "batch *length channels"]:
    """`x (1 + scale) + shift`; both may have axes of length one."""
    return x * (1 + scale) + shift


class TimeEmbed(nn.Module):
    """Time features through two matrices with a SiLU between."""

    channels: int
    features: int = 256
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, times: Float[Array, "batch"]) -> Float[Array, "batch channels"]:
        dense = partial(
            Dense,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        x = dense(self.channels, name="linear1")(
            time_features(times, self.features).astype(self.dtype)
        )
        return dense(self.channels, name="linear2")(nn.silu(x))
