"""Attention for NVIDIA GPUs (Pallas-Triton).

One program for a block of queries of one head: it walks first over the key blocks that its queries
see fully, without a mask, then over those that they see in part; invisible blocks are not visited.
Row statistics and the output stay in registers. Triton wants powers of two, so lengths are padded
to blocks and head sizes to the next power.

Backward: programs by query block (dq), by key block (dk and dv, over the query heads of a group,
scores transposed), and by tile of the bias where it needs a gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import compat
from kernels_pallas.attention.problem import Gradients, Operands, Problem, apart
from kernels_pallas.attention.tile import (
    FULL,
    PARTIAL,
    SKIP,
    Axis,
    Tile,
    additive,
    dot,
    flags,
    pad_length,
    quotient,
    remainder,
    row_statistics,
)
from kernels_pallas.scores import EMPTY, MASKED

# Query block, key block and warps of each pass, by bytes of a number and head size: the largest
# that Triton compiles for an H100 without spilling registers, whatever a call asks for (bias,
# slopes, dropout), within the 227 KB of shared memory.
BLOCKS = {
    (2, 64): dict(forward=(128, 64, 8), dq=(128, 64, 8), dkv=(64, 128, 8)),
    (2, 128): dict(forward=(128, 64, 8), dq=(64, 32, 8), dkv=(32, 64, 8)),
    (2, 256): dict(forward=(64, 32, 8), dq=(64, 32, 8), dkv=(64, 32, 8)),
    (4, 32): dict(forward=(128, 64, 8), dq=(64, 32, 4), dkv=(32, 64, 4)),
    (4, 64): dict(forward=(128, 64, 8), dq=(64, 32, 4), dkv=(32, 32, 4)),
    (4, 128): dict(forward=(64, 32, 8), dq=(32, 16, 8), dkv=(32, 32, 8)),
    (4, 256): dict(forward=(32, 32, 8), dq=(32, 32, 8), dkv=(32, 32, 8)),
}


def _blocks(x: Operands, which: str) -> tuple[int, int, int]:
    """Query block, key block and warps of a pass before they are cut to the lengths."""
    width, size = max(x.query.shape[3], x.value.shape[3]), x.value.dtype.itemsize
    row = BLOCKS[size, min(w for s, w in BLOCKS if s == size and w >= width)]
    fallback = {"dbias": "forward", "delta": "dq"}
    return row[which] if which in row else row[fallback[which]]


def _power(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _cut(length: int, block: int) -> Axis:
    block = min(block, _power(length))
    return Axis(length, block, -(-length // block))


class _Grid:
    """The geometry of a call: blocks, padded arrays, visits, and how a tile is made."""

    def __init__(self, problem: Problem, x: Operands, which: str):
        self.problem = problem
        self.batch, self.heads, queries, _ = x.query.shape
        self.kv_heads, keys = x.key.shape[1:3]
        self.group = self.heads // self.kv_heads
        q_block, k_block, self.warps = _blocks(x, which)
        self.q, self.k = _cut(queries, q_block), _cut(keys, k_block)
        if max(self.q.block, self.k.block) <= 64 and x.query.shape[3] <= 64:
            self.warps = 4
        self.which = which
        self.names = ["query", "key", "value"]
        self.arrays = [
            _pad(x.query, self.q.padded), _pad(x.key, self.k.padded), _pad(x.value, self.k.padded)
        ]  # fmt: skip
        if x.bias is not None:
            self.names.append("bias")
            self.arrays.append(pad_length(pad_length(additive(x.bias), self.q, 2), self.k, 3))
        if x.query_segments is not None:
            self.names += ["q_segments", "k_segments"]
            self.arrays += [
                jnp.pad(x.query_segments, [(0, 0), (0, self.q.padded - self.q.length)]),
                jnp.pad(x.key_segments, [(0, 0), (0, self.k.padded - self.k.length)]),
            ]
        if x.slopes is not None:
            self.add("slopes", x.slopes.astype(jnp.float32))
        if x.seeds is not None:
            self.add("seeds", x.seeds)
        flag = flags(problem.table_mask, self.q, self.k)
        if x.query_segments is not None:
            flag = np.minimum(flag, PARTIAL)
        self.flag = flag

    def add(self, name, array):
        """One more input."""
        self.names.append(name)
        self.arrays.append(array)

    def rows(self, name, t, fill=0):
        """One more `[batch, heads, queries(, d)]` input, padded."""
        if t.ndim == 4:
            return self.add(name, _pad(t, self.q.padded))
        self.add(name, pad_length(t, self.q, 2, fill))

    def visits(self, flag):
        """Adds the table of one row a block: fully visible blocks first; then their counts."""
        width = _power(max(1, int((flag != SKIP).sum(1).max())), 1)
        index = np.zeros((len(flag), width), np.int32)
        for row, states in enumerate(flag):
            order = np.concatenate(
                [np.flatnonzero(states == FULL), np.flatnonzero(states == PARTIAL)]
            )
            index[row, : len(order)] = order
        self.add("index", jnp.asarray(index))
        self.add("full", jnp.asarray((flag == FULL).sum(1).astype(np.int32)))
        self.add("seen", jnp.asarray((flag != SKIP).sum(1).astype(np.int32)))
        self.no_full, self.no_partial = not (flag == FULL).any(), not (flag == PARTIAL).any()

    def walk(self, refs, row, step, carry):
        """`carry = step(masked, block, carry)` over the visits of a row."""
        full, seen = refs["full"][row], refs["seen"][row]

        def at(masked, t, carry):
            return step(masked, refs["index"][row, t], carry)

        if not self.no_full:
            carry = jax.lax.fori_loop(0, full, partial(at, False), carry)
        if not self.no_partial:
            carry = jax.lax.fori_loop(full, seen, partial(at, True), carry)
        return carry

    def tile(self, refs, b, h, i, j, masked, *, transposed=False) -> Tile:
        """The tile of query block `i` and key block `j`."""
        pl = compat.pallas()
        queries, keys = pl.ds(i * self.q.block, self.q.block), pl.ds(j * self.k.block, self.k.block)

        def q_shaped(t):
            return t[None, :] if transposed else t[:, None]

        def k_shaped(t):
            return t[:, None] if transposed else t[None, :]

        bias = segments = None
        if "bias" in refs:
            rows, heads, per_query, per_key = refs["bias"].shape
            at = remainder(b, rows), h if heads > 1 else 0
            if per_query == self.q.padded and per_key == self.k.padded:
                bias = refs["bias"][*at, queries, keys]
            elif per_key == self.k.padded:
                bias = refs["bias"][*at, 0, keys][None, :]
            elif per_query == self.q.padded:
                bias = refs["bias"][*at, queries, 0][:, None]
            else:
                bias = refs["bias"][*at, 0, 0]
            bias = bias.T if transposed and bias.ndim else bias
        if "q_segments" in refs:
            segments = refs["q_segments"][b, queries], refs["k_segments"][b, keys]
        return Tile(
            q_shaped(i * self.q.block + jnp.arange(self.q.block, dtype=jnp.int32)),
            k_shaped(j * self.k.block + jnp.arange(self.k.block, dtype=jnp.int32)),
            bias=bias,
            slope=refs["slopes"][h] if "slopes" in refs else None,
            q_segments=q_shaped(segments[0]) if segments else None,
            k_segments=k_shaped(segments[1]) if segments else None,
            seed=refs["seeds"][b, h] if "seeds" in refs else None,
            masked=masked,
            keys=self.k.length if self.k.padded > self.k.length else None,
        )

    def keys(self, refs, name, b, h, j):
        """A block of `key` or `value`, for a query head."""
        at = compat.pallas().ds(j * self.k.block, self.k.block)
        return refs[name][b, quotient(h, self.group), at, :]

    def queries(self, refs, name, b, h, i):
        """A block of an array by query, with or without a last axis."""
        at = compat.pallas().ds(i * self.q.block, self.q.block)
        return refs[name][b, h, at, :] if len(refs[name].shape) == 4 else refs[name][b, h, at]

    def call(self, kernel, grid, outputs, interpret):
        """The pallas_call; `kernel(refs, *outs)` indexes whole arrays by program."""
        pl, triton = compat.pallas(), compat.triton()
        names, count = self.names, len(self.arrays)

        def body(*refs):
            kernel(dict(zip(names, refs[:count], strict=True)), *refs[count:])

        return pl.pallas_call(
            body,
            grid=grid,
            out_shape=outputs,
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=2),
            name=f"attention_{self.which}",
            interpret=interpret,
        )(*self.arrays)


def _pad(t, length):
    """Zeros up to `length` tokens and a head size that is a power of two."""
    widths = [(0, 0), (0, 0), (0, length - t.shape[2]), (0, _power(t.shape[3]) - t.shape[3])]
    return jnp.pad(t, widths)


def _ids():
    pl = compat.pallas()
    return pl.program_id(0), pl.program_id(1), pl.program_id(2)


def forward(problem: Problem, x: Operands, *, interpret=False):
    """Output in the value's type and log-sum-exp in float32 (zeros where there is none)."""
    grid, score, precision = _Grid(problem, x, "forward"), problem.score, problem.precision
    grid.visits(grid.flag)
    q, values = grid.q, grid.arrays[2].shape[3]

    def kernel(refs, out_ref, lse_ref):
        i, h, b = _ids()
        query = grid.queries(refs, "query", b, h, i)

        def scores(masked, j):
            tile = grid.tile(refs, b, h, i, j, masked)
            k = grid.keys(refs, "key", b, h, j)
            if tile.guarded(problem):
                k = tile.key(problem, k, grid.keys(refs, "value", b, h, j))
            return tile, tile.finish(problem, dot(query, k, (1, 1), precision))[0]

        def weigh(tile, w, j):
            v = tile.finite(problem, grid.keys(refs, "value", b, h, j))
            return dot(tile.drop(problem, w).astype(v.dtype), v, (1, 0), precision)

        def online(masked, j, carry):
            top, total, acc = carry
            tile, s = scores(masked, j)
            new = jnp.maximum(top, s.max(1))
            w, keep = jnp.exp(s - new[:, None]), jnp.exp(top - new)
            total = total * keep + w.sum(1)
            if acc is not None:
                acc = acc * keep[:, None] + weigh(tile, w, j)
            return new, total, acc

        start = jnp.full((q.block,), EMPTY, jnp.float32), jnp.zeros((q.block,), jnp.float32)
        acc = jnp.zeros((q.block, values), jnp.float32)
        lse = jnp.zeros((q.block,), jnp.float32)
        if score.normalised:
            top, total, out = grid.walk(refs, i, online, (*start, None if score.clipped else acc))
            lse = top + jnp.log(jnp.maximum(total, 1e-37))
        if score.clipped or not score.normalised:

            def second(masked, j, acc):
                tile, s = scores(masked, j)
                return acc + weigh(tile, score.weight(s, lse[:, None]), j)

            out = grid.walk(refs, i, second, acc)
        else:
            out = out / jnp.maximum(total, 1e-37)[:, None]
        at = compat.pallas().ds(i * q.block, q.block)
        out_ref[b, h, at, :] = out.astype(out_ref.dtype)
        lse_ref[b, h, at] = jnp.where(total == 0, MASKED, lse) if score.normalised else lse

    shape = (grid.batch, grid.heads, q.padded)
    outputs = [
        jax.ShapeDtypeStruct((*shape, values), x.value.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    out, lse = grid.call(kernel, (q.count, grid.heads, grid.batch), outputs, interpret)
    return out[:, :, : q.length, : x.value.shape[3]], lse[:, :, : q.length]


def backward(problem: Problem, x: Operands, out, lse, d_out, d_lse, *, interpret=False):
    """Gradients in the operands' types."""
    x, d_out = apart(problem, x, d_out)
    d_out, lse, delta = row_statistics(problem, x, out, lse, d_out, d_lse)
    if problem.score.clipped:
        delta = delta + _by_query(problem, x, (d_out, lse, lse), interpret, only_delta=True)
    stats = (d_out, lse, delta)
    dq, d_slopes = _by_query(problem, x, stats, interpret)
    dk, dv = _by_key(problem, x, stats, interpret)
    d_bias = None
    if x.bias is not None and x.bias.dtype != bool and 1 not in x.bias.shape[2:]:
        d_bias = _bias(problem, x, stats, interpret)
    return Gradients(dq, dk, dv, d_bias, d_slopes)


def _with_rows(problem, x, stats, which):
    grid = _Grid(problem, x, which)
    fills = 0, -MASKED, 0  # no weight in padded rows
    for name, t, fill in zip(("d_out", "lse", "delta"), stats, fills, strict=True):
        grid.rows(name, t, fill)
    return grid


def _by_query(problem, x, stats, interpret, only_delta=False):
    """`dq` and the gradient of the slopes; or `sum(p * g)` of a clipped softmax."""
    which = "delta" if only_delta else "dq"
    grid, precision = _with_rows(problem, x, stats, which), problem.precision
    grid.visits(grid.flag)
    q, width = grid.q, grid.arrays[0].shape[3]
    want_slopes = x.slopes is not None and not only_delta

    def kernel(refs, *outs):
        i, h, b = _ids()
        query, do, lse, delta = (
            grid.queries(refs, name, b, h, i) for name in ("query", "d_out", "lse", "delta")
        )

        def step(masked, j, carry):
            dq, sums = carry
            tile = grid.tile(refs, b, h, i, j, masked)
            k, v = (grid.keys(refs, name, b, h, j) for name in ("key", "value"))
            raw = dot(query, tile.key(problem, k, v), (1, 1), precision)
            dw = dot(do, tile.finite(problem, v), (1, 1), precision)
            if only_delta:
                product = tile.clipped_delta(problem, raw, dw, lse[:, None])
                return None, sums + product.sum(1)
            _, ds, d_raw = tile.gradients(problem, raw, dw, lse[:, None], delta[:, None])
            if want_slopes:
                sums = sums + (ds * tile.distance(problem)).sum(1)
            k = tile.finite(problem, k)
            return dq + dot(d_raw.astype(k.dtype), k, (1, 0), precision), sums

        row_sums = jnp.zeros((q.block,), jnp.float32) if only_delta or want_slopes else None
        acc = None if only_delta else jnp.zeros((q.block, width), jnp.float32)
        dq, row_sums = grid.walk(refs, i, step, (acc, row_sums))
        at = compat.pallas().ds(i * q.block, q.block)
        if not only_delta:
            outs[0][b, h, at, :] = dq.astype(outs[0].dtype)
        if row_sums is not None:
            outs[-1][b, h, at] = row_sums

    shape = (grid.batch, grid.heads, q.padded)
    outputs = [] if only_delta else [jax.ShapeDtypeStruct((*shape, width), x.query.dtype)]
    if only_delta or want_slopes:
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    found = grid.call(kernel, (q.count, grid.heads, grid.batch), outputs, interpret)
    if only_delta:
        return found[0][:, :, : q.length]
    d_slopes = None
    if want_slopes:
        d_slopes = -found[1][:, :, : q.length].sum((0, 2)).astype(x.slopes.dtype)
    return found[0][:, :, : q.length, : x.query.shape[3]], d_slopes


def _by_key(problem, x, stats, interpret):
    """`dk` and `dv`, summed over the query heads of a group."""
    grid, precision = _with_rows(problem, x, stats, "dkv"), problem.precision
    grid.visits(grid.flag.T)
    k = grid.k
    widths = grid.arrays[1].shape[3], grid.arrays[2].shape[3]

    def kernel(refs, dk_ref, dv_ref):
        j, n, b = _ids()
        head = n * grid.group
        key, value = (grid.keys(refs, name, b, head, j) for name in ("key", "value"))

        def of_head(g, carry):
            h = head + g

            def step(masked, i, carry):
                dk, dv = carry
                query, do, lse, delta = (
                    grid.queries(refs, name, b, h, i) for name in ("query", "d_out", "lse", "delta")
                )
                tile = grid.tile(refs, b, h, i, j, masked, transposed=True)
                raw = dot(tile.key(problem, key, value), query, (1, 1), precision)
                dw = dot(tile.finite(problem, value), do, (1, 1), precision)
                w, _, d_raw = tile.gradients(problem, raw, dw, lse[None, :], delta[None, :])
                query = tile.finite(problem, query)
                dv = dv + dot(w.astype(do.dtype), do, (1, 0), precision)
                return dk + dot(d_raw.astype(query.dtype), query, (1, 0), precision), dv

            return grid.walk(refs, j, step, carry)

        carry = tuple(jnp.zeros((k.block, width), jnp.float32) for width in widths)
        if grid.group == 1:
            dk, dv = of_head(0, carry)
        else:
            dk, dv = jax.lax.fori_loop(0, grid.group, of_head, carry)
        at = compat.pallas().ds(j * k.block, k.block)
        dk_ref[b, n, at, :] = dk.astype(dk_ref.dtype)
        dv_ref[b, n, at, :] = dv.astype(dv_ref.dtype)

    shape = (grid.batch, grid.kv_heads, k.padded)
    outputs = [
        jax.ShapeDtypeStruct((*shape, width), t.dtype)
        for width, t in zip(widths, (x.key, x.value), strict=True)
    ]
    grads = grid.call(kernel, (k.count, grid.kv_heads, grid.batch), outputs, interpret)
    return tuple(
        g[:, :, : k.length, : t.shape[3]] for g, t in zip(grads, (x.key, x.value), strict=True)
    )


def _bias(problem, x, stats, interpret):
    """The bias gradient in the bias's shape, each tile summed by one program."""
    grid, precision = _with_rows(problem, x, stats, "dbias"), problem.precision
    q, k = grid.q, grid.k
    grid.add("flag", jnp.asarray(grid.flag))
    rows, bias_heads = x.bias.shape[:2]
    inner = grid.heads // bias_heads

    def kernel(refs, out_ref):
        pl = compat.pallas()
        tile_id, head, row = _ids()
        i, j = quotient(tile_id, k.count), remainder(tile_id, k.count)

        def step(r, total):
            b, h = quotient(r, inner) * rows + row, head + remainder(r, inner)
            tile = grid.tile(refs, b, h, i, j, True)
            k, v = (grid.keys(refs, name, b, h, j) for name in ("key", "value"))
            query, do = (grid.queries(refs, name, b, h, i) for name in ("query", "d_out"))
            raw = dot(query, tile.key(problem, k, v), (1, 1), precision)
            dw = dot(do, tile.finite(problem, v), (1, 1), precision)
            lse, delta = (grid.queries(refs, name, b, h, i) for name in ("lse", "delta"))
            return total + tile.gradients(problem, raw, dw, lse[:, None], delta[:, None])[1]

        # A product, as a selection of two numbers lowers to one of booleans.
        repeats = (refs["flag"][i, j] != SKIP).astype(jnp.int32) * (grid.batch // rows * inner)
        total = jnp.zeros((q.block, k.block), jnp.float32)
        total = jax.lax.fori_loop(0, repeats, step, total)
        queries, keys = pl.ds(i * q.block, q.block), pl.ds(j * k.block, k.block)
        out_ref[row, head, queries, keys] = total.astype(out_ref.dtype)

    output = jax.ShapeDtypeStruct((rows, bias_heads, q.padded, k.padded), x.bias.dtype)
    (grad,) = grid.call(kernel, (q.count * k.count, bias_heads, rows), [output], interpret)
    return grad[:, :, : q.length, : k.length]
