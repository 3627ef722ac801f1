"""Position tables: sines, indices of relative positions, and resizing either to another grid."""

import math

import numpy as np
from jaxtyping import Float


def sinusoids(
    length: int, channels: int, precision: type[np.floating] = np.float64
) -> Float[np.ndarray, "length channels"]:
    """Fixed positions, float32: sines in the even channels, cosines in the odd ones.

    Row p has sin(p / 10000^(c / channels)) in even channel c, and the cosine of the same in the
    next.

    Args:
      length: rows.
      channels: columns.
      precision: of the angles. In code that makes the table in PyTorch it is float32, which is off
        by up to 4e-4 at position 5000.
    """
    even = np.arange(0, channels, 2, dtype=precision)
    rates = np.exp(even * -(np.log(10000.0) / channels)).astype(precision)
    angles = np.arange(length, dtype=precision)[:, None] * rates
    table = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, -1)
    return table[:, :channels].astype(np.float32)


def relative_position_index(window: tuple[int, ...]) -> np.ndarray:
    """Which row of a bias table belongs to a (query, key) pair of a window of any rank.

    The table has a row for each offset, query minus key, row-major: (2h-1)(2w-1) rows for a window
    of h x w (Swin). Returns int64 `[tokens, tokens]`.
    """
    at = np.stack(np.unravel_index(np.arange(math.prod(window)), window), -1)
    offset = at[:, None] - at[None, :] + np.array(window) - 1
    return np.ravel_multi_index(tuple(np.moveaxis(offset, -1, 0)), [2 * w - 1 for w in window])


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """`[new_size, size]` weights of PyTorch's bicubic interpolation of one axis, float64.

    The cubic convolution kernel with a = -0.75, half-pixel centres (align_corners=False), borders
    repeated, no antialiasing: what `F.interpolate(mode="bicubic")` does, which official Swin and
    DeiT code use for their tables. (`jax.image.resize` has a = -0.5 and antialiases.)
    """
    a = -0.75
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((new_size, size))
    for tap in range(4):
        t = np.abs(centre - (first + tap))
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        column = np.clip(first + tap, 0, size - 1)
        np.add.at(weights, (np.arange(new_size), column), np.where(t <= 1, near, far))
    return weights


def resize_grid(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Bicubic resize (see `bicubic_matrix`) of `[old_h*old_w, channels]` to the new grid."""
    grid = np.asarray(table, np.float64).reshape(*old, -1)
    rows, columns = (bicubic_matrix(o, n) for o, n in zip(old, new, strict=True))
    grid = np.einsum("Hh,Ww,hwc->HWc", rows, columns, grid)
    return grid.reshape(new[0] * new[1], -1).astype(table.dtype)


def resize_table(table: np.ndarray, new: tuple[int, int], prefix: int = 0) -> np.ndarray:
    """`resize_grid` of a table `[1, prefix + rows, channels]`; prefix rows stay as they are.

    The old grid is taken to be square, as official code does; where the rows are no square number,
    it is the grid whose sides are nearest to those of the new one in proportion.

    Raises:
      ValueError: if the rows behind the prefix make no such grid.
    """
    rest = table[0, prefix:]
    count, aspect = len(rest), new[0] / new[1]
    side = math.isqrt(count)
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    old = min(pairs, key=lambda p: abs(math.log(p[0] / p[1] / aspect)), default=(0, 1))
    if side * side == count and count:
        old = (side, side)
    elif not count or abs(math.log(old[0] / old[1] / aspect)) > math.log(1.25):
        raise ValueError(
            f"A position table of {table.shape[1]} rows is not a square grid behind {prefix} "
            "prefix rows, nor one of the new grid's proportions, so it cannot be resized; load it "
            "at the image size it was trained with."
        )
    grid = resize_grid(rest, old, new)
    return np.concatenate([table[0, :prefix], grid])[None]
