"""Large images in tiles: memory of one tile, whatever the size of the image.

    large = in_tiles(lambda x: model.apply(variables, x), images, scale=4, tile=64, overlap=16)

Each tile is run with `overlap` more pixels around its core, and only the core is kept. What lies
within the reach of the function is then as in the whole image. A tile that would pass the image's
border is moved back inside, so all tiles have one shape, and one program serves them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def in_tiles(
    run: Callable[[Array], Array],
    images: Float[Array, "batch height width channels"],
    *,
    scale: int = 1,
    tile: int = 64,
    overlap: int = 16,
    align: int = 1,
) -> Float[Array, "batch height*scale width*scale out_channels"]:
    """`run(images)`, tile by tile.

    Args:
      run: from images to images `scale` times as large; called with one shape.
      images: of any size; an axis that is not longer than a tile is one tile.
      scale: by how much `run` enlarges.
      tile: side of the core of a tile, in pixels of the input.
      overlap: pixels around the core on every side that are run and thrown away.
      align: the window of models that cut their input into windows. Tile and overlap must be
        multiples of it; images are reflected up to multiples of it.

    Returns:
      The enlarged images.

    Raises:
      ValueError: if tile or overlap are not multiples of `align`, or the tile is empty.
    """
    if tile < 1 or overlap < 0 or tile % align or overlap % align:
        raise ValueError(
            f"tile={tile} and overlap={overlap} must be multiples of {align}, the window that the "
            "model cuts images into, and tile at least that."
        )
    height, width = images.shape[1:3]
    fill = [(0, -side % align) for side in (height, width)]
    images = jnp.pad(images, ((0, 0), *fill, (0, 0)), mode="reflect")
    (rows, high), (columns, wide) = (_cores(side, tile, overlap) for side in images.shape[1:3])
    starts = np.array([(r[0], c[0]) for r in rows for c in columns])
    batch, _, _, channels = images.shape

    def one(start: Array) -> Array:
        at = (0, start[0], start[1], 0)
        return run(jax.lax.dynamic_slice(images, at, (batch, high, wide, channels)))

    # One tile after the other: the loop's memory is that of one, and of the result.
    done = jax.lax.map(one, jnp.asarray(starts))
    lines = []
    for i, (top, begin, end) in enumerate(rows):
        line = []
        for j, (left, first, last) in enumerate(columns):
            out = done[i * len(columns) + j]
            down = slice((begin - top) * scale, (end - top) * scale)
            right = slice((first - left) * scale, (last - left) * scale)
            line.append(out[:, down, right])
        lines.append(jnp.concatenate(line, 2))
    return jnp.concatenate(lines, 1)[:, : height * scale, : width * scale]


def _cores(size: int, tile: int, overlap: int) -> tuple[list[tuple[int, int, int]], int]:
    """Of each tile on an axis: where it starts, where its core begins and ends; and its length."""
    length = min(size, tile + 2 * overlap)
    if length == size:
        return [(0, 0, size)], size
    tiles = []
    for begin in range(0, size, tile):
        start = min(max(begin - overlap, 0), size - length)
        tiles.append((start, begin, min(begin + tile, size)))
    return tiles, length
