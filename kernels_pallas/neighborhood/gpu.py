"""Neighbourhood attention for NVIDIA GPUs (Pallas-Triton).

One program for a tile of 64 positions (64, 8 x 8 or 4 x 4 x 4) of one head: it walks in blocks over
the box of positions that its tile can see. Arrays are read as callers hold them, positions by
computed addresses, so nothing is transposed, padded or copied for dilation. Visibility and the row
of the bias table follow from coordinates.

Backward: programs by tile of queries (dq, and the log-sum-exp, formed again), by tile of keys (dk
and dv, over the box of queries that can see them), and by block of scores, summed over the batch,
where the bias needs a gradient; its sum over positions is a product with constants in XLA.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import compat
from kernels_pallas.attention.tile import dot, finite, marked, quotient, seen_only
from kernels_pallas.neighborhood.geometry import Axis
from kernels_pallas.neighborhood.problem import Operands, Problem
from kernels_pallas.scores import EMPTY, MASKED

TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}  # positions of a program along each axis
POSITIONS = 64
# Bytes of a number and head size: positions that a program meets at once, and its warps. The
# largest that Triton compiles for an H100 without spilling registers; float32 of 128 always spills.
BLOCK = {(2, 64): (32, 4), (2, 128): (32, 8), (4, 64): (32, 4)}


def refusal(problem: Problem, x: Operands) -> str | None:
    """Why the kernel cannot run a call, or None."""
    del problem
    dtype, width = x.value.dtype, max(x.query.shape[-1], x.value.shape[-1])
    widest = max(w for size, w in BLOCK if size == dtype.itemsize)
    if width > widest:
        return f"head_dim {width} is above {widest}, the most the cuda kernel holds of {dtype}"
    return None


def forward(problem: Problem, x: Operands, *, interpret=False):
    """`[batch, *space, heads, value_dim]` in the value's type."""
    grid = _Grid(problem, x, interpret)

    def kernel(refs, out_ref):
        b, h, here = grid.here()
        q = refs["query"][b, here.at, h, :]

        def step(j, carry):
            top, total, acc = carry
            there = grid.keys_of(here, j)
            k, v = (refs[name][b, there.at, h, :] for name in ("key", "value"))
            s = grid.scores(refs, h, here, there, q, marked(k, v))
            new = jnp.maximum(top, s.max(1))
            w, keep = _weights(s, new[:, None]), jnp.exp(top - new)
            acc = acc * keep[:, None] + dot(w.astype(v.dtype), finite(v), (1, 0), problem.precision)
            return new, total * keep + w.sum(1), acc

        start = _rows(EMPTY), _rows(0.0), jnp.zeros((POSITIONS, out_ref.shape[3]), jnp.float32)
        _, total, out = jax.lax.fori_loop(0, grid.blocks(grid.keys), step, start)
        out = out / jnp.maximum(total, 1e-37)[:, None]
        grid.store(out_ref, b, h, here, out)

    (out,) = grid.call(kernel, "forward", [grid.like("value")])
    return grid.restore(out, x.value)


def backward(problem: Problem, x: Operands, out, d_out, *, interpret=False):
    """Gradients of the operands, in their types."""
    grid = _Grid(problem, x, interpret)
    d_out = d_out.astype(x.value.dtype)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    grid.arrays |= {"d_out": grid.flat(d_out), "delta": grid.flat(delta)}
    dq, grid.arrays["lse"] = _by_query(grid)
    dk, dv = _by_key(grid)
    d_bias = None
    if x.bias is not None:
        d_bias = jnp.where(x.bias > MASKED, _of_bias(grid).reshape(x.bias.shape), 0.0)
        d_bias = d_bias.astype(x.bias.dtype)
    grads = zip((dq, dk, dv), x[:3], strict=True)
    return Operands(*(grid.restore(t, like) for t, like in grads), d_bias)


def _by_query(grid):
    """`dq` and the log-sum-exp."""
    precision = grid.problem.precision

    def kernel(refs, dq_ref, lse_ref):
        b, h, here = grid.here()
        q, do = (refs[name][b, here.at, h, :] for name in ("query", "d_out"))
        delta = refs["delta"][b, here.at, h]

        def statistics(j, carry):
            top, total = carry
            there = grid.keys_of(here, j)
            k, v = (refs[name][b, there.at, h, :] for name in ("key", "value"))
            s = grid.scores(refs, h, here, there, q, marked(k, v))
            new = jnp.maximum(top, s.max(1))
            return new, total * jnp.exp(top - new) + _weights(s, new[:, None]).sum(1)

        blocks = grid.blocks(grid.keys)
        top, total = jax.lax.fori_loop(0, blocks, statistics, (_rows(EMPTY), _rows(0.0)))
        lse = jnp.where(total == 0, 0.0, top + jnp.log(jnp.maximum(total, 1e-37)))

        def step(j, dq):
            there = grid.keys_of(here, j)
            k, v = (refs[name][b, there.at, h, :] for name in ("key", "value"))
            w = _weights(grid.scores(refs, h, here, there, q, marked(k, v)), lse[:, None])
            dw = dot(do, finite(v), (1, 1), precision)
            d_raw = seen_only(w, w * (dw - delta[:, None])) * grid.problem.scale
            return dq + dot(d_raw.astype(k.dtype), finite(k), (1, 0), precision)

        dq = jax.lax.fori_loop(0, blocks, step, jnp.zeros(q.shape, jnp.float32))
        grid.store(dq_ref, b, h, here, dq)
        grid.store(lse_ref, b, h, here, lse)

    lse = jax.ShapeDtypeStruct(grid.arrays["delta"].shape, jnp.float32)
    return grid.call(kernel, "dq", [grid.like("query"), lse])


def _by_key(grid):
    """`dk` and `dv`, with scores transposed."""
    precision = grid.problem.precision

    def kernel(refs, dk_ref, dv_ref):
        b, h, here = grid.here()
        k, v = (refs[name][b, here.at, h, :] for name in ("key", "value"))

        def step(j, carry):
            dk, dv = carry
            there = grid.queries_of(here, j)
            q, do = (refs[name][b, there.at, h, :] for name in ("query", "d_out"))
            lse, delta = (refs[name][b, there.at, h] for name in ("lse", "delta"))
            s = grid.scores(refs, h, there, here, q, marked(k, v), transposed=True)
            w = _weights(s, lse[None, :])
            dw = seen_only(w, dot(finite(v), do, (1, 1), precision))
            d_raw = seen_only(w, w * (dw - delta[None, :])) * grid.problem.scale
            w = seen_only(w, w + 0.0 * dw)  # NaN where the output's gradient is
            dv = dv + dot(w.astype(do.dtype), finite(do), (1, 0), precision)
            return dk + dot(d_raw.astype(q.dtype), finite(q), (1, 0), precision), dv

        start = tuple(jnp.zeros(t.shape, jnp.float32) for t in (k, v))
        dk, dv = jax.lax.fori_loop(0, grid.blocks(grid.queries), step, start)
        grid.store(dk_ref, b, h, here, dk)
        grid.store(dv_ref, b, h, here, dv)

    return grid.call(kernel, "dkv", [grid.like("key"), grid.like("value")])


def _of_bias(grid):
    """The gradient of the flat bias table: scores' gradients by tile, then their sum."""
    blocks, precision = grid.blocks(grid.keys), grid.problem.precision

    def kernel(refs, out_ref):
        pl = compat.pallas()
        tile, h, j = (pl.program_id(i) for i in range(3))
        here = grid.tile(tile, repeat=False)
        there = grid.keys_of(here, j)

        def step(b, total):
            q, do = (refs[name][b, here.at, h, :] for name in ("query", "d_out"))
            k, v = (refs[name][b, there.at, h, :] for name in ("key", "value"))
            lse, delta = (refs[name][b, here.at, h] for name in ("lse", "delta"))
            w = _weights(grid.scores(refs, h, here, there, q, marked(k, v)), lse[:, None])
            dw = dot(do, finite(v), (1, 1), precision)
            return total + seen_only(w, w * (dw - delta[:, None]))

        total = jnp.zeros((POSITIONS, grid.block), jnp.float32)
        total = jax.lax.fori_loop(0, grid.batch, step, total)
        out_ref[h, tile, :, pl.ds(j * grid.block, grid.block)] = total

    shape = (grid.heads, grid.tiles, POSITIONS, blocks * grid.block)
    programs = (grid.tiles, grid.heads, blocks)
    (ds,) = grid.call(kernel, "dbias", [jax.ShapeDtypeStruct(shape, jnp.float32)], programs)
    ds = ds[..., : math.prod(grid.keys)]
    rank = len(grid.axes)
    ds = ds.reshape(
        grid.heads,
        *(a.dilation * a.runs for a in grid.axes),
        *(a.queries for a in grid.axes),
        *grid.keys,
    )
    for i, (axis, keys) in enumerate(zip(grid.axes, grid.keys, strict=True)):
        # The axis's tiles, queries and keys give way to its rows of the table, put last.
        tiles, sums = _bias_sums(axis, keys)
        ds = jnp.moveaxis(ds, (1, 1 + rank - i, 1 + 2 * (rank - i)), (-3, -2, -1))
        ds = jnp.einsum("...tqk,ts->...sqk", ds, tiles, precision="highest")
        ds = jnp.einsum("...sqk,sqkr->...r", ds, sums, precision="highest")
    return ds


def _bias_sums(axis: Axis, keys: int):
    """Tiles that lie alike `[tiles, kinds]`; rows of a kind `[kinds, queries, keys, rows]`."""
    shifts = []
    for number in range(axis.dilation * axis.runs):
        members = _members(axis, number // axis.runs)
        first = number % axis.runs * axis.queries
        shifts.append(_first_key(axis, keys, first, members, np) - first)
    kinds, kind = np.unique(shifts, return_inverse=True)
    row = kinds[:, None, None] + np.arange(keys) - np.arange(axis.queries)[:, None]
    sums = np.eye(2 * axis.kernel - 1, dtype=np.float32)[
        np.clip(row + axis.kernel - 1, 0, 2 * axis.kernel - 2)
    ]
    return np.eye(len(kinds), dtype=np.float32)[kind.reshape(-1)], sums


class _Place(NamedTuple):
    """Positions that a program works on.

    Attributes:
      starts: for each axis, `(residue, first member, members of its class)`.
      members: for each axis, the member that each position is.
      at: flat index of each position, within the array even where it is not inside.
      inside: whether it exists.
    """

    starts: list
    members: list
    at: jax.Array
    inside: jax.Array


class _Grid:
    """The geometry of a call: tiles, the boxes that they see, and how scores are formed."""

    def __init__(self, problem: Problem, x: Operands, interpret):
        self.problem, self.interpret = problem, interpret
        self.batch, self.heads = x.query.shape[0], x.query.shape[-2]
        sides = TILE[len(problem.axes)]
        self.axes = [
            replace(a, queries=n, unit=1, dilation=min(a.dilation, a.size))
            for a, n in zip(problem.axes, sides, strict=True)
        ]
        self.tiles = math.prod(a.dilation * a.runs for a in self.axes)
        self.keys = [a.keys for a in self.axes]
        self.queries = [_most_queries(a) for a in self.axes]
        wide = 64 if max(x.query.shape[-1], x.value.shape[-1]) <= 64 else 128
        self.block, self.warps = BLOCK[x.value.dtype.itemsize, wide]
        self.arrays = {name: self.flat(getattr(x, name)) for name in ("query", "key", "value")}
        if x.bias is not None:
            bias = jnp.maximum(x.bias.astype(jnp.float32), MASKED)
            self.arrays["bias"] = bias.reshape(self.heads, -1)

    def flat(self, t):
        """Positions in one axis; head sizes that are powers of two, and at least 16."""
        t = t.reshape(t.shape[0], -1, *t.shape[1 + len(self.axes) :])
        if t.ndim == 3:
            return t
        width = max(16, 1 << (t.shape[3] - 1).bit_length())
        return jnp.pad(t, [(0, 0)] * 3 + [(0, width - t.shape[3])])

    def restore(self, t, like):
        """The inverse of `flat`."""
        return t[..., : like.shape[-1]].reshape(like.shape)

    def like(self, name):
        """The shape of a result."""
        return jax.ShapeDtypeStruct(self.arrays[name].shape, self.arrays[name].dtype)

    def blocks(self, counts) -> int:
        """Blocks of a box."""
        return -(-math.prod(counts) // self.block)

    # --- inside a kernel -----------------------------------------------------------------------
    def here(self):
        """`(batch, head, tile)` of a program."""
        pl = compat.pallas()
        return pl.program_id(2), pl.program_id(1), self.tile(pl.program_id(0))

    def tile(self, number, repeat=True) -> _Place:
        """The positions of a tile; those beyond a class repeat its last one, or do not exist.

        Repeated positions find and write what the last one does: no mask is needed.
        """
        starts = []
        for axis in reversed(self.axes):
            n = jax.lax.rem(number, jnp.int32(axis.dilation * axis.runs))
            number = quotient(number, axis.dilation * axis.runs)
            residue = quotient(n, axis.runs)
            first = jax.lax.rem(n, jnp.int32(axis.runs)) * axis.queries  # traced even if 0
            starts.insert(0, (residue, first, _members(axis, residue)))
        index = jnp.arange(POSITIONS, dtype=jnp.int32)
        return self._place(starts, [a.queries for a in self.axes], index, repeat)

    def keys_of(self, tile: _Place, j) -> _Place:
        """Block `j` of the positions that a tile can see."""
        starts = [
            (residue, _first_key(axis, keys, first, members, jnp), members)
            for axis, keys, (residue, first, members) in zip(
                self.axes, self.keys, tile.starts, strict=True
            )
        ]
        return self._place(starts, self.keys, self._block(j))

    def queries_of(self, tile: _Place, j) -> _Place:
        """Block `j` of the positions that can see a tile."""
        starts = [
            (residue, _first_query(axis, first, jnp), members)
            for axis, (residue, first, members) in zip(self.axes, tile.starts, strict=True)
        ]
        return self._place(starts, self.queries, self._block(j))

    def _block(self, j):
        return j * self.block + jnp.arange(self.block, dtype=jnp.int32)

    def _place(self, starts, counts, index, repeat=False) -> _Place:
        """Positions number `index` of a box."""
        inside, members, at = index < math.prod(counts), [], jnp.zeros_like(index)
        for (_, first, _), count in zip(reversed(starts), reversed(counts), strict=True):
            members.insert(0, first + jax.lax.rem(index, jnp.int32(count)))
            index = quotient(index, count)
        if repeat:
            members = [jnp.minimum(m, n - 1) for m, (_, _, n) in zip(members, starts, strict=True)]
        for axis, m, (residue, _, last) in zip(self.axes, members, starts, strict=True):
            inside &= m < last
            position = residue + axis.dilation * jnp.minimum(m, axis.members - 1)
            at = at * axis.size + jnp.minimum(position, axis.size - 1)
        return _Place(starts, members, at, inside)

    def scores(self, refs, h, queries: _Place, keys: _Place, q, k, *, transposed=False):
        """Finished scores `[queries, keys]`, or transposed; MASKED where invisible."""

        def of_query(t):
            return t[None, :] if transposed else t[:, None]

        def of_key(t):
            return t[:, None] if transposed else t[None, :]

        visible, row = of_query(queries.inside) & of_key(keys.inside), 0
        for axis, i, j, (_, _, members) in zip(
            self.axes, queries.members, keys.members, queries.starts, strict=True
        ):
            first, last = _window(axis, i, members, jnp)
            visible &= (of_key(j) >= of_query(first)) & (of_key(j) < of_query(last))
            away = of_key(j) - of_query(i) + axis.kernel - 1
            row = row * (2 * axis.kernel - 1) + jnp.clip(away, 0, 2 * axis.kernel - 2)
        a, b = (k, q) if transposed else (q, k)
        s = dot(a, b, (1, 1), self.problem.precision) * self.problem.scale
        if "bias" in refs:
            bias = refs["bias"][h, row]
            visible &= bias > MASKED
            s = s + bias
        return jnp.where(visible, s, MASKED)

    def store(self, ref, b, h, tile: _Place, t):
        """Writes what a tile found."""
        index = (b, tile.at, h, slice(None)) if t.ndim == 2 else (b, tile.at, h)
        ref[index] = t.astype(ref.dtype)

    def call(self, kernel, name, outputs, programs=None):
        """The pallas_call; `kernel(refs, *outs)` indexes whole arrays by program."""
        pl, triton = compat.pallas(), compat.triton()
        names, count = list(self.arrays), len(self.arrays)

        def body(*refs):
            kernel(dict(zip(names, refs[:count], strict=True)), *refs[count:])

        return pl.pallas_call(
            body,
            grid=programs or (self.tiles, self.heads, self.batch),
            out_shape=outputs,
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=2),
            name=f"neighborhood_{name}",
            interpret=self.interpret,
        )(*self.arrays.values())


def _weights(s, lse):
    """Zero where a key is hidden, even where a row that sees what is not finite is NaN."""
    return jnp.where(s <= EMPTY, 0.0, jnp.exp(s - lse))


def _rows(value):
    return jnp.full((POSITIONS,), value, jnp.float32)


def _members(axis: Axis, residue):
    """Of a residue class; classes have one of two sizes."""
    longer = axis.size % axis.dilation or axis.dilation
    return axis.members - 1 * (residue >= longer)


def _window(axis: Axis, query, members, xp):
    """The first member that a query sees, and the one after the last."""
    if axis.causal:
        return query - axis.kernel + 1, query + 1
    first = xp.maximum(xp.minimum(query - axis.kernel // 2, members - axis.kernel), 0)
    return first, first + axis.kernel


def _first_key(axis: Axis, keys: int, first_query, members, xp):
    """Where the box of keys of a tile of queries starts."""
    first, _ = _window(axis, first_query, members, xp)
    return xp.maximum(xp.minimum(first, axis.members - keys), 0)


def _first_query(axis: Axis, first_key, xp):
    """Where the box of queries that see a tile of keys starts."""
    if axis.causal:
        return first_key
    return xp.where(first_key < axis.kernel, 0, first_key - axis.kernel + 1 + axis.kernel // 2)


def _most_queries(axis: Axis) -> int:
    """The longest such box."""
    longest = 1
    for members in {axis.members, _members(axis, axis.dilation - 1)}:
        for first in range(0, members, axis.queries):
            last_key = min(first + axis.queries, members) - 1
            if axis.causal:
                last = min(last_key + axis.kernel, members)
            elif last_key >= members - axis.kernel:
                last = members
            else:
                last = last_key + axis.kernel // 2 + 1
            longest = max(longest, last - int(_first_query(axis, first, np)))
    return longest
