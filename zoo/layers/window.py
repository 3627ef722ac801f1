"""Windows of maps and clips: cutting, the mask of shifted ones, and attention inside (Swin)."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

import kernels_pallas
from zoo.layers.attention import attention_weights
from zoo.layers.dense import Dense
from zoo.layers.materialize import materialized
from zoo.layers.position import relative_position_index


def fit_window(size: tuple[int, int], window_size: int, shifted: bool) -> tuple[int, int]:
    """Window and shift that a block really uses on a map of `size` (height, width)."""
    if min(size) <= window_size:
        return min(size), 0
    return window_size, window_size // 2 if shifted else 0


def pad_map(
    x: Float[Array, "batch height width channels"], height: int, width: int
) -> Float[Array, "batch height_out width_out channels"]:
    """A map with zeros below and on the right, up to at least this size."""
    below, right = max(0, height - x.shape[1]), max(0, width - x.shape[2])
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def pad_to_multiple(
    x: Float[Array, "batch height width channels"], rows: int, columns: int
) -> Float[Array, "batch height_out width_out channels"]:
    """A map with zeros below and on the right, up to the next multiples of rows and columns."""
    return pad_map(x, -(-x.shape[1] // rows) * rows, -(-x.shape[2] // columns) * columns)


def window_partition(
    x: Float[Array, "batch *size channels"], window: tuple[int, ...]
) -> Float[Array, "windows tokens channels"]:
    """Cut maps (or clips) into windows; those of one map are row-major and stand together."""
    batch, *size, channels = x.shape
    n = len(window)
    cells = [part for length, w in zip(size, window, strict=True) for part in (length // w, w)]
    x = x.reshape(batch, *cells, channels)
    order = (0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.transpose(order).reshape(-1, math.prod(window), channels)


def window_merge(
    windows: Float[Array, "windows tokens channels"], size: tuple[int, ...], window: tuple[int, ...]
) -> Float[Array, "batch *size channels"]:
    """The inverse of `window_partition` for maps of `size`."""
    n = len(window)
    counts = [length // w for length, w in zip(size, window, strict=True)]
    x = windows.reshape(-1, *counts, *window, windows.shape[-1])
    order = (0, *(axis for i in range(1, n + 1) for axis in (i, i + n)), 2 * n + 1)
    return x.transpose(order).reshape(-1, *size, windows.shape[-1])


def shifted_window_mask(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> np.ndarray:
    """Additive mask `[windows of a map, tokens, tokens]`, float32: 0, or -100 across a seam."""
    label = np.zeros((), int)
    for length, w, s in zip(size, window, shift, strict=True):
        at = np.arange(length)
        region = (at >= length - w).astype(int) + (at >= length - s) if s else np.zeros_like(at)
        label = 3 * label[..., None] + region
    label = np.asarray(window_partition(label[None, ..., None], window))[..., 0]
    return np.where(label[:, :, None] == label[:, None, :], 0.0, -100.0).astype(np.float32)


@partial(jax.jit, static_argnums=(1, 2))  # traced once for all blocks of a stage
def position_bias(
    table: Float[Array, "rows heads"], window: tuple[int, ...], tokens: int | None = None
) -> Float[Array, "heads tokens tokens"]:
    """What a table of relative positions adds to the scores in a window, or its first `tokens`."""
    index = relative_position_index(window)[:tokens, :tokens]
    bias = rearrange(table[index.reshape(-1)], "(q k) n -> n q k", q=len(index))
    return materialized(bias)  # read by every pass over the scores


class WindowAttention(nn.Module):
    """Multi-head attention inside each window, with a bias learned per relative position.

    Attributes:
      window: of the bias table. Windows of fewer tokens use the upper left of its index, as
        official Video Swin does.
    """

    num_heads: int
    window: tuple[int, ...]
    qkv_bias: bool = True
    scale: float | None = None
    attention_dropout: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "windows tokens channels"],
        mask: Float[Array, "masks tokens tokens"] | None = None,
        train: bool = False,
    ) -> Float[Array, "windows tokens channels"]:
        windows, tokens, channels = x.shape
        init = nn.initializers.normal(0.02)
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        qkv = dense(3 * channels, use_bias=self.qkv_bias, name="qkv")(x)
        rows = math.prod(2 * w - 1 for w in self.window)
        table = self.param("relative_position_bias", init, (rows, self.num_heads), self.param_dtype)
        bias = position_bias(table, self.window, tokens)
        dropping = train and self.attention_dropout > 0
        looking = self.is_mutable_collection("intermediates")
        if dropping or looking:  # the general path, with one bias a window
            heads = (windows, tokens, 3, self.num_heads, channels // self.num_heads)
            query, key, value = jnp.unstack(qkv.reshape(heads), axis=2)
            every = bias[None]
            if mask is not None:
                every = jnp.tile(every + mask[:, None], (windows // len(mask), 1, 1, 1))
        if looking:
            weights = attention_weights(query, key, bias=every, scale=self.scale)
            self.sow("intermediates", "attention", weights)
        if dropping:
            rng = self.make_rng("dropout")
            x = kernels_pallas.attention(
                query,
                key,
                value,
                bias=every,
                scale=self.scale,
                dropout=self.attention_dropout,
                rng=rng,
            )
        else:
            x = kernels_pallas.window_attention(
                qkv, num_heads=self.num_heads, bias=bias, mask=mask, scale=self.scale
            )
        x = dense(channels, name="out")(x.reshape(windows, tokens, channels))
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class ShiftedWindowAttention(WindowAttention):
    """`WindowAttention` of a whole map or clip, cut into windows that may be shifted (Swin).

    A map that windows do not tile is completed with zeros at the end of each axis; the tokens there
    take part as keys that hold the biases.

    Attributes:
      shift: how far the map is rolled on each axis before it is cut; what was not adjacent before
        does not see each other. () is no shift.
      cut: the windows, where they are smaller than `window`, whose bias table they share.
    """

    shift: tuple[int, ...] = ()
    cut: tuple[int, ...] | None = None

    def __call__(
        self, x: Float[Array, "batch *size channels"], train: bool = False
    ) -> Float[Array, "batch *size channels"]:
        """Attend inside the windows of each map."""
        size, window = x.shape[1:-1], self.cut or self.window
        extra = [(0, -length % w) for length, w in zip(size, window, strict=True)]
        x = jnp.pad(x, ((0, 0), *extra, (0, 0))) if np.any(extra) else x
        padded, moved = x.shape[1:-1], any(self.shift)
        axes = tuple(range(1, x.ndim - 1))
        x = jnp.roll(x, [-s for s in self.shift], axes) if moved else x
        mask = shifted_window_mask(padded, window, self.shift) if moved else None
        x = super().__call__(window_partition(x, window), mask, train)
        x = window_merge(x, padded, window)
        x = jnp.roll(x, self.shift, axes) if moved else x
        return x[(slice(None), *(slice(length) for length in size))] if np.any(extra) else x
