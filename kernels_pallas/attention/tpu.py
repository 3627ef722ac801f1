"""Attention for TPU (Mosaic).

Grid: batch, heads, query blocks, visits; the last axis runs in order. Which key blocks a query
block visits comes from tables in scalar memory, so that invisible blocks cost neither traffic nor
arithmetic and fully visible ones no mask. Running maximum, sum and output live in vector memory,
each row statistic repeated over 128 lanes; the log-sum-exp leaves as a row.

Backward: one kernel by query block (dq, and ALiBi's row sums), one by key block (dk, dv; the
query heads of a group and their blocks innermost, scores transposed so that row statistics lie
along lanes), and one more for the bias, with the reduced examples and heads innermost. Lengths up
to a block are read as they are; longer ones are padded to whole blocks.

Few queries of grouped heads, as in decoding, are folded into the rows of one block, so that each
key is read once for the group.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import chips, compat
from kernels_pallas.attention.problem import Gradients, Operands, Problem, apart
from kernels_pallas.attention.tile import (
    FULL,
    PARTIAL,
    SKIP,
    Axis,
    Tile,
    additive,
    cut,
    dot,
    flags,
    pad_length,
    quotient,
    remainder,
    row_statistics,
    table,
    with_segments,
)
from kernels_pallas.scores import EMPTY, MASKED

LANES = 128
BLOCK_WITHOUT_MASK = 1024
BLOCK_WITH_MASK = 512


class _Call:
    """One pallas_call over (batch, heads, rows, visits), and the tile that a step works on.

    `by_key` turns the roles: rows are key blocks, visits are (query head of the group, query
    block), and tiles are transposed.
    """

    def __init__(
        self, problem: Problem, x: Operands, limit: int | None, *, by_key=False, fold=True
    ):
        self.problem, self.by_key = problem, by_key
        self.queries, limit = x.query.shape[2], limit or block_limit(problem, x)
        self.folded = fold and not by_key and folds(x)
        self.batch, self.heads, queries, self.width = x.query.shape
        self.kv_heads, keys = x.key.shape[1:3]
        self.group = self.heads // self.kv_heads
        if self.folded:
            self.heads, queries, self.group = self.kv_heads, queries * self.group, 1
        self.q, self.k = cut(queries, limit, LANES), cut(keys, limit, LANES)
        rows = Axis(self.queries, self.queries, 1) if self.folded else self.q
        flag = flags(problem.table_mask, rows, self.k)
        self.table = table(flag.T if by_key else flag)
        self.dynamic = x.query_segments is not None
        whole = folded(x) if self.folded and self.dynamic else x
        self.flag = with_segments(self.table, whole, self.q, self.k, by_key=by_key)
        # every block is visited, in order and without a mask: no table is read
        self.always = not self.dynamic and bool((self.table.flag == FULL).all())
        self.rows = self.k.count if by_key else self.q.count
        self.visits = self.table.width
        self.steps = self.visits * (self.group if by_key else 1)

    # --- where a step's blocks lie -------------------------------------------------------------
    def place(self, b, h, i, t, *scalars):
        """`(b, query head, kv head, q block, k block, flag)` of a grid point."""
        visit = remainder(t, self.visits)
        if self.always:
            other, state = visit, FULL
        else:
            index, flag = scalars[:2]
            other = index[i * self.visits + visit]
            at = ((b if self.dynamic else 0) * self.rows + i) * self.visits + visit
            state = flag[at]
            if self.dynamic:  # one block stays in place of all that segments rule out
                other = jax.lax.select(state == SKIP, jnp.int32(0), other)
        if self.by_key:
            return b, h * self.group + quotient(t, self.visits), h, other, i, state
        return b, h, quotient(h, self.group), i, other, state

    def inputs(self, x: Operands, stats=()):
        """`(arrays, specs)`: the operands of a tile, then row statistics `[batch, heads, L]`."""
        pl = compat.pallas()
        q, k, x = self.q, self.k, folded(x) if self.folded else x

        def at(choose):
            def index_map(b, h, i, t, *scalars):
                return choose(*self.place(b, h, i, t, *scalars))

            return index_map

        arrays, specs = [], []

        def add(t, shape, choose):
            arrays.append(t)
            specs.append(pl.BlockSpec(shape, at(choose)))

        by_q, by_k = (
            (lambda b, h, n, i, j, _: (b, h, i, 0)),
            (lambda b, h, n, i, j, _: (b, n, j, 0)),
        )
        add(pad_length(x.query, q, 2), (1, 1, q.block, x.query.shape[3]), by_q)
        add(pad_length(x.key, k, 2), (1, 1, k.block, x.key.shape[3]), by_k)
        add(pad_length(x.value, k, 2), (1, 1, k.block, x.value.shape[3]), by_k)
        if x.bias is not None:
            bias = pad_length(pad_length(additive(x.bias), q, 2), k, 3)
            rows, per_head = bias.shape[0], bias.shape[1] > 1
            per_query, per_key = (bias.shape[2] == q.padded, bias.shape[3] == k.padded)
            add(
                bias,
                (1, 1, q.block if per_query else 1, k.block if per_key else 1),
                lambda b, h, n, i, j, _: (
                    remainder(b, rows),
                    h if per_head else 0,
                    i if per_query else 0,
                    j if per_key else 0,
                ),
            )
        if x.query_segments is not None:
            q_row = self.by_key  # queries along lanes
            for t, axis, row, block in (
                (x.query_segments, q, q_row, 3),
                (x.key_segments, k, not q_row, 4),
            ):
                t = pad_length(t, axis, 1)
                if row:
                    add(t[:, None, :], (1, 1, axis.block), lambda *p, n=block: (p[0], 0, p[n]))
                else:
                    add(t[:, :, None], (1, axis.block, 1), lambda *p, n=block: (p[0], p[n], 0))
        for t, fill in zip(stats, (0, -MASKED, 0), strict=False):  # no weight in padded rows
            if t.ndim == 4:
                add(pad_length(t, q, 2), (1, 1, q.block, t.shape[3]), by_q)
            else:
                t = pad_length(t[:, :, None, :], q, 3, fill)
                add(t, (1, 1, 1, q.block), lambda b, h, n, i, j, _: (b, h, 0, i))
        return arrays, specs

    def scalars(self, x: Operands):
        """Scalar-memory arrays: the table, then slopes and seeds where there are any."""
        found = [] if self.always else [jnp.asarray(self.table.index), self.flag]
        if x.slopes is not None:
            found.append(x.slopes.astype(jnp.float32))
        if x.seeds is not None:
            found.append(jax.lax.bitcast_convert_type(x.seeds, jnp.int32).ravel())
        return found

    def open(self, scalars, refs, x: Operands):
        """`(flag, make, refs)`: this step's flag, `make(masked) -> Tile`, and refs by name."""
        pl = compat.pallas()
        b, h, i, t = (pl.program_id(axis) for axis in range(4))
        b, h, _, i, j, flag = self.place(b, h, i, t, *scalars)
        scalars = list(scalars if self.always else scalars[2:])
        slope = scalars.pop(0)[h] if x.slopes is not None else None
        seed = None
        if x.seeds is not None:
            seed = scalars.pop(0)[b * self.heads + h].astype(jnp.uint32)
        names = ["query", "key", "value"]
        names += ["bias"] if x.bias is not None else []
        names += ["q_segments", "k_segments"] if x.query_segments is not None else []
        refs = dict(zip(names, refs, strict=True))
        padded = self.k.padded > self.k.length

        def make(masked: bool) -> Tile:
            q_shape, k_shape = (self.q.block, 1), (1, self.k.block)
            if self.by_key:
                q_shape, k_shape = q_shape[::-1], k_shape[::-1]
            bias = refs["bias"][0, 0] if "bias" in refs else None
            at_q = i * self.q.block + jax.lax.broadcasted_iota(jnp.int32, q_shape, self.by_key)
            return Tile(
                jax.lax.rem(at_q, jnp.int32(self.queries)) if self.folded else at_q,
                j * self.k.block + jax.lax.broadcasted_iota(jnp.int32, k_shape, not self.by_key),
                bias=bias.T if self.by_key and bias is not None else bias,
                slope=slope,
                q_segments=refs["q_segments"][0] if self.dynamic else None,
                k_segments=refs["k_segments"][0] if self.dynamic else None,
                seed=seed,
                masked=masked,
                keys=self.k.length if padded else None,
            )

        return flag, make, refs

    def visit(self, flag, step, also=True):
        """Run `step(masked)` as the flag says, and only where `also` holds."""
        pl = compat.pallas()
        if self.always:
            pl.when(also)(partial(step, False)) if also is not True else step(False)
            return
        pl.when((flag == PARTIAL) & also)(partial(step, True))
        if self.dynamic or (self.table.flag == FULL).any():
            pl.when((flag == FULL) & also)(partial(step, False))

    def call(self, kernel, name, x, arrays, specs, outputs, scratch, steps, interpret):
        """The pallas_call; `outputs` are `(shape, dtype, block, index map over b h i)`."""
        pl, pltpu = compat.pallas(), compat.tpu()
        scalars = self.scalars(x)
        heads = self.kv_heads if self.by_key else self.heads
        return pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _, _ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(self.batch, heads, self.rows, steps),
                in_specs=specs,
                out_specs=[
                    pl.BlockSpec(block, lambda b, h, i, t, *_, f=index_map: f(b, h, i))
                    for _, _, block, index_map in outputs
                ],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=chips.vmem_bytes(),
            ),
            name=f"attention_{name}",
            interpret=interpret,
        )(*scalars, *arrays)


def block_limit(problem: Problem, x: Operands) -> int:
    """The longest block: short ones skip more, long ones have tables that fit scalar memory."""
    plain = problem.mask is None and x.bias is None
    long = table_bytes(problem, x, BLOCK_WITH_MASK) > chips.SCALAR_BYTES
    limit = BLOCK_WITHOUT_MASK if plain or long else BLOCK_WITH_MASK
    while limit > LANES and block_bytes(x, limit) > chips.vmem_bytes():
        limit //= 2
    return limit


def block_bytes(x: Operands, limit: int) -> int:
    """About the vector memory of a step of the backward pass: six tiles of scores, and operands."""
    size, widths = x.value.dtype.itemsize, (x.query.shape[3], x.value.shape[3])
    rows, keys = (min(n, limit) for n in (x.query.shape[2], x.key.shape[2]))
    arrays = sum(-(-w // LANES) * LANES * (rows + keys) for w in widths)
    bias = 0 if x.bias is None else rows * keys * x.bias.dtype.itemsize
    return 4 * 6 * rows * keys + arrays * (2 * size + 4) + 2 * bias


def table_bytes(problem: Problem, x: Operands, limit: int) -> int:
    """The most scalar memory that the tables of visits take with blocks of that length."""
    if problem.mask is None and x.query_segments is None:
        return 0
    blocks = math.ceil(x.query.shape[2] / limit) * math.ceil(x.key.shape[2] / limit)
    return 4 * blocks * (1 + (1 if x.query_segments is None else x.query.shape[0]))


def refusal(problem: Problem, x: Operands) -> str | None:
    """Why the kernels cannot run a call, or None."""
    limit = block_limit(problem, x)
    if (held := block_bytes(x, limit)) > chips.vmem_bytes():
        return f"a step needs {held >> 20} MB of vector memory, more than the chip has"
    if table_bytes(problem, x, limit) > chips.SCALAR_BYTES:
        return "the tables of blocks to visit do not fit into scalar memory"
    return None


def folds(x: Operands) -> bool:
    """Whether the queries of a group's heads become rows of one block, as in decoding.

    Keys and values are then read once for each group, not once for each query head.
    """
    group = x.query.shape[1] // x.key.shape[1]
    return group > 1 and group * x.query.shape[2] <= LANES and x.slopes is None and x.seeds is None


def folded(x: Operands) -> Operands:
    """The operands with one head for each key head; rows are (head of the group, query)."""
    batch, heads, queries, width = x.query.shape
    kv_heads = x.key.shape[1]
    group = heads // kv_heads
    bias, segments = x.bias, x.query_segments
    if bias is not None and bias.shape[1] > 1:
        shape = (len(bias), kv_heads, group, queries, bias.shape[3])
        bias = bias.reshape(*shape[:3], *bias.shape[2:])
        bias = jnp.broadcast_to(bias, shape).reshape(len(bias), kv_heads, -1, shape[-1])
    elif bias is not None and bias.shape[2] > 1:
        bias = jnp.tile(bias, (1, 1, group, 1))
    if segments is not None:
        segments = jnp.tile(segments, (1, group))
    query = x.query.reshape(batch, kv_heads, group * queries, width)
    return x._replace(query=query, bias=bias, query_segments=segments)


def _wide(column, width):
    """A lane-replicated statistic `[rows, 128]` at another width."""
    if width <= LANES:
        return column[:, :width]
    if width % LANES == 0:  # whole registers repeated: no work
        return jnp.concatenate([column] * (width // LANES), axis=1)
    return jnp.broadcast_to(column[:, :1], (column.shape[0], width))


def _as_row(column):
    """`[rows, 128]`, lane-replicated, to `[1, rows]`."""
    return column.T[:1]


def _as_column(row):
    """`[1, rows]` to `[rows, 128]`, lane-replicated."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def forward(problem: Problem, x: Operands, *, limit: int | None = None, interpret=False):
    """Output in the value's type and log-sum-exp in float32 (zeros where there is none).

    Args:
      problem: the static part of the call.
      x: the operands, heads first.
      limit: longest block of queries and of keys, a multiple of 128.
      interpret: as in `pallas_call`.
    """
    pl = compat.pallas()
    call = _Call(problem, x, limit)
    score, q, values = problem.score, call.q, x.value.shape[3]
    arrays, specs = call.inputs(x)
    count, n_scalars = call.visits, len(call.scalars(x))
    steps = 2 * count if score.clipped else count

    def kernel(*refs):
        scalars, refs = refs[:n_scalars], refs[n_scalars:]
        flag, make, named = call.open(scalars, refs[: len(arrays)], x)
        out_ref, lse_ref, top_ref, total_ref, acc_ref = refs[len(arrays) :]
        t = pl.program_id(3)

        @pl.when(t == 0)
        def _():
            top_ref[...] = jnp.full_like(top_ref, EMPTY)
            total_ref[...] = jnp.zeros_like(total_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def scores(masked):
            tile = make(masked)
            key = tile.key(problem, named["key"][0, 0], named["value"][0, 0])
            raw = dot(named["query"][0, 0], key, (1, 1), problem.precision)
            return tile, tile.finish(problem, raw)[0]

        def accumulate(tile, w, keep):
            v = tile.finite(problem, named["value"][0, 0])
            w = tile.drop(problem, w).astype(v.dtype)
            part = dot(w, v, (1, 0), problem.precision)
            acc_ref[...] = part + (acc_ref[...] if keep is None else acc_ref[...] * keep)

        def statistics(masked, with_values):
            tile, s = scores(masked)
            old = top_ref[...]
            top = jnp.maximum(old, s.max(1, keepdims=True))
            w = jnp.exp(s - _wide(top, s.shape[1]))
            keep = jnp.exp(old - top)
            total_ref[...] = total_ref[...] * keep + w.sum(1, keepdims=True)
            top_ref[...] = top
            if with_values:
                accumulate(tile, w, _wide(keep, values))

        def weights(masked):
            tile, s = scores(masked)
            lse = top_ref[...] + jnp.log(jnp.maximum(total_ref[...], 1e-37))
            w = score.weight(s, _wide(lse, s.shape[1]) if score.normalised else None)
            accumulate(tile, w, None)

        if score.clipped:
            call.visit(flag, partial(statistics, with_values=False), t < count)
            call.visit(flag, weights, t >= count)
        elif score.normalised:
            call.visit(flag, partial(statistics, with_values=True))
        else:
            call.visit(flag, weights)

        @pl.when(t == steps - 1)
        def _():
            out, total = acc_ref[...], total_ref[...]
            if score.normalised:
                lse = jnp.where(total == 0, MASKED, top_ref[...] + jnp.log(total))
                if not score.clipped:
                    out = out / _wide(jnp.maximum(total, 1e-37), values)
            else:
                lse = jnp.zeros_like(total)
            out_ref[0, 0] = out.astype(out_ref.dtype)
            lse_ref[0, 0] = _as_row(lse)

    shape = (call.batch, call.heads)
    outputs = [
        (
            (*shape, q.padded, values),
            x.value.dtype,
            (1, 1, q.block, values),
            lambda b, h, i: (b, h, i, 0),
        ),
        ((*shape, 1, q.padded), jnp.float32, (1, 1, 1, q.block), lambda b, h, i: (b, h, 0, i)),
    ]
    scratch = [(q.block, LANES), (q.block, LANES), (q.block, values)]
    out, lse = call.call(kernel, "forward", x, arrays, specs, outputs, scratch, steps, interpret)
    rows = x.query.shape[:3]
    return out[:, :, : q.length].reshape(*rows, values), lse[:, :, 0, : q.length].reshape(rows)


def backward(
    problem: Problem,
    x: Operands,
    out,
    lse,
    d_out,
    d_lse,
    *,
    limit: int | None = None,
    interpret=False,
) -> Gradients:
    """Gradients in the operands' types. Arguments as in `forward`."""
    options = dict(limit=limit, interpret=interpret)
    x, d_out = apart(problem, x, d_out)
    d_out, lse, delta = row_statistics(problem, x, out, lse, d_out, d_lse)
    if problem.score.clipped:
        delta = delta + _clipped_delta(problem, x, d_out, lse, **options)
    stats = (d_out, lse, delta)
    dq, d_slopes = _by_query(problem, x, stats, **options)
    dk, dv = _by_key(problem, x, stats, **options)
    d_bias = None
    if x.bias is not None and x.bias.dtype != bool and 1 not in x.bias.shape[2:]:
        d_bias = _bias(problem, x, stats, **options)
    return Gradients(dq, dk, dv, d_bias, d_slopes)


def products(problem, tile, named, do_ref):
    """`q k^T` and `do v^T` of a tile by query."""
    k, v = named["key"][0, 0], named["value"][0, 0]
    raw = dot(named["query"][0, 0], tile.key(problem, k, v), (1, 1), problem.precision)
    return raw, dot(do_ref[0, 0], tile.finite(problem, v), (1, 1), problem.precision)


def _rows_kernel(problem, x, call, arrays, n_scalars, body, finish):
    """A kernel by query block: statistics as columns in scratch, `body(tile, raw, dw, ...)`."""
    pl = compat.pallas()

    def kernel(*refs):
        scalars, refs = refs[:n_scalars], refs[n_scalars:]
        tiles = refs[: len(arrays) - 3]
        flag, make, named = call.open(scalars, tiles, x)
        do_ref, lse_ref, delta_ref = refs[len(arrays) - 3 : len(arrays)]
        rest = refs[len(arrays) :]
        outs, (lse_column, delta_column), sums = rest[:-4], rest[-4:-2], rest[-2:]
        t = pl.program_id(3)

        @pl.when(t == 0)
        def _():
            lse_column[...] = _as_column(lse_ref[0, 0])
            delta_column[...] = _as_column(delta_ref[0, 0])
            for ref in sums:
                ref[...] = jnp.zeros_like(ref)

        def step(masked):
            tile = make(masked)
            raw, dw = products(problem, tile, named, do_ref)
            wide = raw.shape[1]
            stats = _wide(lse_column[...], wide), _wide(delta_column[...], wide)
            body(tile, raw, dw, stats, named, sums)

        call.visit(flag, step)

        @pl.when(t == call.steps - 1)
        def _():
            finish(outs, sums)

    return kernel


def _clipped_delta(problem, x, d_out, lse, *, limit, interpret):
    """`sum(p * g)` over keys, `[batch, heads, queries]`."""
    call = _Call(problem, x, limit, fold=False)
    arrays, specs = call.inputs(x, (d_out, lse, lse))

    def body(tile, raw, dw, stats, named, sums):
        product = tile.clipped_delta(problem, raw, dw, stats[0])
        sums[0][...] += product.sum(1, keepdims=True)

    def finish(outs, sums):
        outs[0][0, 0] = _as_row(sums[0][...])

    kernel = _rows_kernel(problem, x, call, arrays, len(call.scalars(x)), body, finish)
    q, column = call.q, (call.q.block, LANES)
    output = ((*x.query.shape[:2], 1, q.padded), jnp.float32, (1, 1, 1, q.block), _row_at)
    (delta,) = call.call(
        kernel, "delta", x, arrays, specs, [output], [column] * 4, call.steps, interpret
    )
    return delta[:, :, 0, : q.length]


def _row_at(b, h, i):
    return b, h, 0, i


def _by_query(problem, x, stats, *, limit, interpret):
    """`dq`, and the gradient of ALiBi's slopes."""
    call = _Call(problem, x, limit, fold=False)
    arrays, specs = call.inputs(x, stats)
    q, width, shape = call.q, call.width, x.query.shape[:2]

    def body(tile, raw, dw, stats, named, sums):
        _, ds, d_raw = tile.gradients(problem, raw, dw, *stats)
        k = tile.finite(problem, named["key"][0, 0])
        sums[0][...] += dot(d_raw.astype(k.dtype), k, (1, 0), problem.precision)
        if x.slopes is not None:
            part = ds * tile.distance(problem)
            sums[1][...] += part.sum(1, keepdims=True)

    def finish(outs, sums):
        outs[0][0, 0] = sums[0][...].astype(outs[0].dtype)
        if x.slopes is not None:
            outs[1][0, 0] = _as_row(sums[1][...])

    outputs = [
        (
            (*shape, q.padded, width),
            x.query.dtype,
            (1, 1, q.block, width),
            lambda b, h, i: (b, h, i, 0),
        )
    ]
    if x.slopes is not None:
        outputs.append(((*shape, 1, q.padded), jnp.float32, (1, 1, 1, q.block), _row_at))
    column = (q.block, LANES)
    kernel = _rows_kernel(problem, x, call, arrays, len(call.scalars(x)), body, finish)
    scratch = [column, column, (q.block, width), column]
    dq, *sums = call.call(kernel, "dq", x, arrays, specs, outputs, scratch, call.steps, interpret)
    dq = dq[:, :, : q.length]
    if x.slopes is None:
        return dq, None
    return dq, -sums[0][..., : q.length].sum((0, 2, 3)).astype(x.slopes.dtype)


def _by_key(problem, x, stats, *, limit, interpret):
    """`dk` and `dv`, summed over the query heads of a group."""
    pl = compat.pallas()
    call = _Call(problem, x, limit, by_key=True)
    arrays, specs = call.inputs(x, stats)
    n_scalars, k = len(call.scalars(x)), call.k

    def kernel(*refs):
        scalars, refs = refs[:n_scalars], refs[n_scalars:]
        flag, make, named = call.open(scalars, refs[: len(arrays) - 3], x)
        do_ref, lse_ref, delta_ref = refs[len(arrays) - 3 : len(arrays)]
        dk_ref, dv_ref, dk_sum, dv_sum = refs[len(arrays) :]
        t = pl.program_id(3)

        @pl.when(t == 0)
        def _():
            dk_sum[...] = jnp.zeros_like(dk_sum)
            dv_sum[...] = jnp.zeros_like(dv_sum)

        def step(masked):
            tile = make(masked)
            query, do = named["query"][0, 0], do_ref[0, 0]
            k, v = named["key"][0, 0], named["value"][0, 0]
            raw = dot(tile.key(problem, k, v), query, (1, 1), problem.precision)
            dw = dot(tile.finite(problem, v), do, (1, 1), problem.precision)
            w, _, d_raw = tile.gradients(problem, raw, dw, lse_ref[0, 0], delta_ref[0, 0])
            query = tile.finite(problem, query)
            dv_sum[...] += dot(w.astype(do.dtype), do, (1, 0), problem.precision)
            dk_sum[...] += dot(d_raw.astype(query.dtype), query, (1, 0), problem.precision)

        call.visit(flag, step)

        @pl.when(t == call.steps - 1)
        def _():
            dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
            dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)

    outputs = [
        (
            (call.batch, call.kv_heads, k.padded, t.shape[3]),
            t.dtype,
            (1, 1, k.block, t.shape[3]),
            lambda b, h, i: (b, h, i, 0),
        )
        for t in (x.key, x.value)
    ]
    scratch = [(k.block, x.key.shape[3]), (k.block, x.value.shape[3])]
    grads = call.call(kernel, "dkv", x, arrays, specs, outputs, scratch, call.steps, interpret)
    return tuple(t[:, :, : k.length] for t in grads)


def _bias(problem, x, stats, *, limit, interpret):
    """The bias gradient in the bias's shape: reduced examples and heads run innermost."""
    pl, pltpu = compat.pallas(), compat.tpu()
    call = _Call(problem, x, limit, fold=False)
    q, k = call.q, call.k
    dense = flags(problem.table_mask, q, k)
    call.table = call.table._replace(
        index=np.tile(np.arange(k.count, dtype=np.int32), q.count),
        flag=dense.ravel(),
        width=k.count,
    )
    call.visits = k.count
    call.flag = with_segments(call.table, x, q, k, by_key=False)
    call.always = not call.dynamic and bool((dense == FULL).all())
    rows, bias_heads = x.bias.shape[:2]
    inner_heads = call.heads // bias_heads
    repeats = call.batch // rows * inner_heads

    place = call.place

    def of_grid(row, head, block, r, *scalars):
        b = quotient(r, inner_heads) * rows + row
        h = head if inner_heads == 1 else remainder(r, inner_heads)
        return place(b, h, quotient(block, k.count), remainder(block, k.count), *scalars)

    call.place = of_grid
    arrays, specs = call.inputs(x, stats)
    scalars = call.scalars(x)

    def kernel(*refs):
        scalar_refs, refs = refs[: len(scalars)], refs[len(scalars) :]
        flag, make, named = call.open(scalar_refs, refs[: len(arrays) - 3], x)
        do_ref, lse_ref, delta_ref = refs[len(arrays) - 3 : len(arrays)]
        out_ref, total = refs[len(arrays) :]
        r = pl.program_id(3)

        @pl.when(r == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        def step(masked):
            tile = make(masked)
            raw, dw = products(problem, tile, named, do_ref)
            wide = raw.shape[1]
            columns = (_wide(_as_column(ref[0, 0]), wide) for ref in (lse_ref, delta_ref))
            total[...] += tile.gradients(problem, raw, dw, *columns)[1]

        call.visit(flag, step)

        @pl.when(r == repeats - 1)
        def _():
            out_ref[0, 0] = total[...].astype(out_ref.dtype)

    grad = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, bias_heads, q.padded, k.padded), x.bias.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(rows, bias_heads, q.count * k.count, repeats),
            in_specs=specs,
            out_specs=pl.BlockSpec(
                (1, 1, q.block, k.block),
                lambda row, head, block, r, *_: (
                    row,
                    head,
                    quotient(block, k.count),
                    remainder(block, k.count),
                ),
            ),
            scratch_shapes=[pltpu.VMEM((q.block, k.block), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=chips.vmem_bytes(),
        ),
        name="attention_dbias",
        interpret=interpret,
    )(*scalars, *arrays)
    return grad[:, :, : q.length, : k.length]
