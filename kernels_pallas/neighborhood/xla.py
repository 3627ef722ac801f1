"""Neighbourhood attention in plain JAX: tiles of the grid, one after the other.

The keys of a tile are cut out along each axis with static strided slices. They overlap, so keys
and values exist `prod(keys / queries)` times over (3 times for a 7 x 7 kernel and 8 x 8 tiles);
scores exist for one tile only, and are formed again for the backward pass.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from kernels_pallas.neighborhood.geometry import Axis, grid_kinds
from kernels_pallas.scores import EMPTY, MASKED


def attend(axes: tuple[Axis, ...], query, key, value, bias, bad=None, *, scale, precision):
    """Heads-first neighbourhood attention.

    Args:
      axes: the grid.
      query: `[batch, heads, *space, head_dim]`.
      key: `[batch, heads, *space, head_dim]`.
      value: `[batch, heads, *space, value_dim]`.
      bias: `[heads, rows of the flat table]`, or None.
      bad: `[batch, heads, *space, 1]`: NaN for queries that become NaN where they see a key, else
        zero; or None.
      scale: of the scores.
      precision: of the products.

    Returns:
      `[batch, heads, *space, value_dim]`.
    """
    kind, visible, row = grid_kinds(axes)
    wide = jnp.promote_types(value.dtype, jnp.float32)
    kinds = jnp.asarray(visible)[:, None]
    if bias is not None:
        kinds = jnp.where(kinds, bias.astype(wide)[:, row].swapaxes(0, 1), MASKED)
    product = partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    (query, bad_query), (key, bad_key), (value, bad_value) = (
        finite(t, wide) for t in (query, key, value)
    )
    bad_query = bad_query if bad is None else bad_query + bad

    @partial(jax.checkpoint, prevent_cse=False)
    def one(tile):
        q, bad_q, k, v, bad_k, kind = tile
        s = scale * product("bhqd,bhkd->bhqk", q, k) + bad_q + bad_k.swapaxes(-1, -2)
        seen = lax.dynamic_index_in_dim(kinds, kind, keepdims=False)
        if bias is None:
            s = jnp.where(seen, s, MASKED)
        else:
            s = jnp.where(seen > MASKED, s + seen, MASKED)
        top = lax.stop_gradient(s.max(-1, keepdims=True))
        top = jnp.where(top == jnp.inf, jnp.nan, jnp.maximum(top, EMPTY))
        # all zeros where a bias hides the whole window; rows that see NaN are NaN where they see,
        # and not divided by it, which would make NaN of the gradients of what they do not see
        w = jnp.where(s <= EMPTY, 0.0, jnp.exp(s - top))
        total = w.sum(-1, keepdims=True)
        out = product("bhqk,bhkd->bhqd", w.astype(v.dtype), v) / jnp.where(total > 0, total, 1.0)
        return out.astype(v.dtype)

    bad_query, bad_key = lax.stop_gradient((bad_query, bad_key + bad_value))
    tiles = (
        *(query_tiles(axes, t) for t in (query, bad_query)),
        *(key_tiles(axes, t) for t in (key, value, bad_key)),
    )
    if len(kind) == 1:
        out = one((*(t[0] for t in tiles), 0))[None]
    else:
        out = lax.map(one, (*tiles, jnp.asarray(kind)))
    return join_tiles(axes, out)


def finite(t, dtype):
    """`t` with zeros where it is not finite, and a NaN for each token where it is not, else zero.

    Numbers that are not finite thus stay with the queries that see them: zero times infinity in a
    product with what is hidden would carry them on.
    """
    good = jnp.isfinite(t)
    bad = jnp.where(good.all(-1, keepdims=True), 0, jnp.nan).astype(dtype)
    return jnp.where(good, t, 0), bad


def query_tiles(axes: tuple[Axis, ...], x):
    """`[batch, heads, *space, d]` -> `[tiles, batch, heads, queries of a tile, d]`."""
    widths = [(0, a.dilation * a.runs * a.queries - a.size) for a in axes]
    x = jnp.pad(x, [(0, 0), (0, 0), *widths, (0, 0)])
    parts = [n for a in axes for n in (a.runs, a.queries, a.dilation)]
    x = x.reshape(*x.shape[:2], *parts, x.shape[-1])
    runs, queries, residue = (range(2 + i, 2 + 3 * len(axes), 3) for i in range(3))
    tiles = [axis for both in zip(residue, runs, strict=True) for axis in both]
    x = x.transpose(*tiles, 0, 1, *queries, x.ndim - 1)
    count = math.prod(len(a.starts) for a in axes)
    return x.reshape(count, *x.shape[len(tiles) : len(tiles) + 2], -1, x.shape[-1])


def join_tiles(axes: tuple[Axis, ...], x):
    """The inverse of `query_tiles`."""
    outer = [n for a in axes for n in (a.dilation, a.runs)]
    x = x.reshape(*outer, *x.shape[1:3], *(a.queries for a in axes), x.shape[-1])
    rank = len(axes)
    order = [2 * rank, 2 * rank + 1]
    for i in range(rank):
        order += [2 * i + 1, 2 * rank + 2 + i, 2 * i]
    x = x.transpose(*order, x.ndim - 1)
    full = [a.dilation * a.runs * a.queries for a in axes]
    x = x.reshape(*x.shape[:2], *full, x.shape[-1])
    return x[(slice(None), slice(None), *(slice(a.size) for a in axes))]


def key_tiles(axes: tuple[Axis, ...], x):
    """`[batch, heads, *space, d]` -> `[tiles, batch, heads, keys of a tile, d]`."""
    widths = [(0, a.dilation * a.members - a.size) for a in axes]
    x = jnp.pad(x, [(0, 0), (0, 0), *widths, (0, 0)])[None]
    for i, a in enumerate(axes):
        slices = [
            lax.slice_in_dim(
                x,
                residue + a.dilation * start,
                residue + a.dilation * (start + a.keys - 1) + 1,
                a.dilation,
                axis=3 + i,
            )
            for residue, start in a.starts
        ]
        x = rearrange(jnp.stack(slices, axis=1), "tiles n ... -> (tiles n) ...")
    return x.reshape(*x.shape[:3], -1, x.shape[-1])
