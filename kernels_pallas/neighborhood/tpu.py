"""Neighbourhood attention for TPU (Mosaic).

A step takes tiles of 128 queries (image rows x columns) of some heads, and the keys that they see:
rows are sliced on an untiled axis, columns at whole registers, nothing is gathered. Heads lie
packed in lanes as a projection wrote them; queries are stacked over heads with the other heads'
lanes zeroed, so one product serves all heads and nothing is transposed outside. Scores stand
transposed, keys in sublanes and (head, query) in lanes: maxima and sums cost no lane traffic.

Bias and visibility along the columns are one table in vector memory for each (row distance, kind
of column tile), rolled from `2 * kernel_size - 1` numbers a row distance when a group of heads
begins; visibility along the rows is one vector of lanes a key row. The backward pass forms the
weights again, sums dk and dv over the tiles of an image and the bias gradient over all images in
vector memory, and rolls the latter back at the end. Dilation is space to batch.
"""

import math

import jax
import jax.numpy as jnp

from kernels_pallas import chips, compat
from kernels_pallas.attention.tile import dot, finite, seen_only
from kernels_pallas.neighborhood.problem import Operands, Problem
from kernels_pallas.neighborhood.tpu_plan import LANES, Plan
from kernels_pallas.scores import EMPTY, MASKED

LOG2E = math.log2(math.e)


def refusal(problem: Problem, x: Operands) -> str | None:
    """Why the kernel cannot run a call, or None."""
    if (kernel := problem.axes[-1].kernel) > LANES // 2:
        return f"kernel_size {kernel} on the last axis is above {LANES // 2}, the most it holds"
    if (held := Plan(problem, x).vmem_bytes()) > chips.vmem_bytes():
        return f"images of {x.query.shape[1:-2]} need {held >> 20} MB of vector memory"
    return None


def forward(problem: Problem, x: Operands, *, interpret=False):
    """`[batch, *space, heads, value_dim]` in the value's type."""
    pl, plan = compat.pallas(), Plan(problem, x)
    inputs = _inputs(plan, x)
    scratch = [(plan.table_shape, jnp.float32), *_copies(plan, x)]

    def kernel(*refs):
        masks, (q_ref, k_ref, v_ref, out_ref, table_ref, *copies) = _open(plan, refs)
        ids = plan.ids()
        first, first_of_image = plan.first_step(ids)

        @pl.when(first)
        def _():
            _fill(plan, masks, table_ref)

        k_ref, v_ref = _whole_units(plan, first_of_image, (k_ref, v_ref), copies)

        def of_tile(numbers):
            tile = _Tile(plan, ids, numbers)
            q = plan.stacked(q_ref[tile.queries], ids, numbers)
            k, v = (ref[tile.window].reshape(plan.keys, -1) for ref in (k_ref, v_ref))
            w, total = tile.weights(masks, table_ref, q, k, v)
            parts = plan.products(finite(v), w.astype(v.dtype))
            scale = 1.0 / total
            parts = [p * scale[:, h * LANES : (h + 1) * LANES] for h, p in enumerate(parts)]
            plan.write(out_ref, tile.queries, parts)

        plan.each_tile(of_tile)

    out = _like(inputs[-1]), plan.spec(plan.value_width, True)
    (out,) = plan.call(kernel, "forward", inputs, [out], scratch, interpret)
    return plan.unpack(out)


def backward(problem: Problem, x: Operands, out, d_out, *, interpret=False):
    """Gradients of the operands, in their types. Weights are formed again, the output not used."""
    del out
    pl, plan = compat.pallas(), Plan(problem, x)
    inputs = _inputs(plan, x)
    q, k, v = inputs[-3:]
    d_out = plan.pack(d_out.astype(x.value.dtype))
    inputs.append((d_out, plan.spec(plan.value_width, True)))
    scratch = [(plan.table_shape, jnp.float32)]
    scratch += [((*plan.tall, w), jnp.float32) for w in (plan.width, plan.value_width)]
    scratch += [(plan.table_shape, jnp.float32)] if plan.has_bias else []
    scratch += _copies(plan, x)
    outputs = [(_like(t), t[1]) for t in (q, k, v)]
    if plan.has_bias:
        outputs.append((_like(inputs[2]), inputs[2][1]))

    def kernel(*refs):
        masks, refs = _open(plan, refs)
        (q_ref, k_ref, v_ref, do_ref), refs = refs[:4], refs[4:]
        (dq_ref, dk_ref, dv_ref, *d_rows), refs = refs[: len(outputs)], refs[len(outputs) :]
        (table_ref, dk_sum, dv_sum, *rest) = refs
        d_table, copies = (rest[:1], rest[1:]) if plan.has_bias else ([], rest)
        ids = plan.ids()
        first, first_of_image = plan.first_step(ids)
        last, last_of_image = plan.last_step(ids)

        @pl.when(first)
        def _():
            _fill(plan, masks, table_ref)
            for ref in d_table:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        @pl.when(first_of_image)
        def _():
            for ref in (dk_sum, dv_sum):
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        k_ref, v_ref = _whole_units(plan, first_of_image, (k_ref, v_ref), copies)

        def of_tile(numbers):
            tile, precision = _Tile(plan, ids, numbers), problem.precision
            q, do = (plan.stacked(ref[tile.queries], ids, numbers) for ref in (q_ref, do_ref))
            k, v = (ref[tile.window].reshape(plan.keys, -1) for ref in (k_ref, v_ref))
            w, total = tile.weights(masks, table_ref, q, k, v)
            w = seen_only(w, w * (1.0 / total))
            dw = seen_only(w, dot(finite(v), do, (1, 1), precision))
            ds = seen_only(w, w * (dw - (w * dw).sum(0, keepdims=True)))
            w = seen_only(w, w + 0.0 * dw)  # NaN where the output's gradient is
            for ref in d_table:
                tile.add(ref, ds)
            d_raw = (ds * problem.scale).astype(q.dtype)
            for ref, t in (
                (dk_sum, dot(d_raw, finite(q), (1, 0), precision)),
                (dv_sum, dot(w.astype(do.dtype), finite(do), (1, 0), precision)),
            ):
                ref[tile.window] += t.reshape(*(a.keys for a in plan.axes), -1)
            plan.write(dq_ref, tile.queries, plan.products(finite(k), d_raw))

        plan.each_tile(of_tile)

        @pl.when(last_of_image)
        def _():
            for ref, total in ((dk_ref, dk_sum), (dv_ref, dv_sum)):
                ref[...] = total[..., : plan.last.members, :].astype(ref.dtype)

        for ref in d_rows:

            @pl.when(last)
            def _(ref=ref):
                _fold(plan, d_table[0], ref)

    dq, dk, dv, *d_rows = plan.call(kernel, "backward", inputs, outputs, scratch, interpret)
    d_bias = None
    if plan.has_bias:
        (d_bias,) = jax.linear_transpose(plan.bias_rows, _float32(x.bias))(d_rows[0])
        d_bias = jnp.where(x.bias > MASKED, d_bias, 0.0).astype(x.bias.dtype)
    return Operands(*(plan.unpack(t) for t in (dq, dk, dv)), d_bias)


def _float32(t):
    return jax.ShapeDtypeStruct(t.shape, jnp.float32)


def _like(entry):
    return jax.ShapeDtypeStruct(entry[0].shape, entry[0].dtype)


def _whole(t):
    """Spec of a small array that stays."""
    return t, compat.pallas().BlockSpec(t.shape, lambda *_: (0,) * t.ndim)


def _inputs(plan: Plan, x: Operands):
    """Visibility, bias rows if there is a bias, query, key, value; with their specs."""
    pl = compat.pallas()
    inputs = [_whole(jnp.asarray(plan.lead_mask())), _whole(jnp.asarray(plan.column_mask()))]
    if plan.has_bias:
        rows = plan.bias_rows(jnp.maximum(x.bias.astype(jnp.float32), MASKED)) * LOG2E
        inputs.append((rows, pl.BlockSpec((None, *rows.shape[1:]), lambda g, *_: (g, 0, 0, 0))))
    return [
        *inputs,
        (plan.pack(x.query), plan.spec(plan.width, True)),
        (plan.pack(x.key), plan.spec(plan.width, False)),
        (plan.pack(x.value), plan.spec(plan.value_width, False)),
    ]


def _open(plan: Plan, refs):
    """`((lead mask, column mask, bias rows or None), the rest)` of a kernel's refs."""
    lead_ref, column_ref, *refs = refs
    return (lead_ref, column_ref, refs.pop(0) if plan.has_bias else None), refs


def _copies(plan: Plan, x: Operands):
    """Scratch for keys and values with whole units of columns, where images lack them."""
    if not plan.padded:
        return []
    widths = (plan.width, x.key.dtype), (plan.value_width, x.value.dtype)
    return [((*plan.tall, width), dtype) for width, dtype in widths]


def _whole_units(plan, first_of_image, refs, copies):
    """Images with whole units of columns: copies with zeros where there is nothing to read."""
    if not plan.padded:
        return refs
    pl, members = compat.pallas(), plan.last.members

    @pl.when(first_of_image)
    def _():
        for ref, copy in zip(refs, copies, strict=True):
            rest = (*copy.shape[:-2], copy.shape[-2] - members, copy.shape[-1])
            copy[..., :members, :] = ref[...]
            copy[..., members:, :] = jnp.zeros(rest, copy.dtype)

    return copies


class _Tile:
    """What forward and backward share of a tile: where it lies, and its weights."""

    def __init__(self, plan: Plan, ids, numbers):
        self.plan = plan
        starts, kinds, distances = (list(t) for t in plan.place(ids, numbers))
        self.queries, self.window = plan.queries(numbers), plan.window(starts)
        self.column_kind = kinds[-1]
        self.lead_kind = 0
        for axis, kind in zip(plan.lead, kinds, strict=False):
            self.lead_kind = self.lead_kind * len(axis.shifted_kinds[1]) + kind
        self.distances = plan.distance_slices(distances)

    def weights(self, masks, table_ref, q, k, v):
        """Weights not yet normalised and their sums, `[keys, lanes]` and `[1, lanes]`.

        Hidden keys have weight zero. Sums are NaN where a key that is seen is not finite.
        """
        plan = self.plan
        s = dot(finite(k), q, (1, 1), plan.problem.precision) * (plan.problem.scale * LOG2E)
        s = jnp.where(plan.spoiled(k, v) > 0, jnp.nan, s)
        table = [table_ref[self.column_kind, at] for at in self.distances]
        extra = table[0] if len(table) == 1 else jnp.concatenate(table)
        if plan.lead:
            extra = extra + masks[0][self.lead_kind]
        extra = jnp.broadcast_to(extra, (plan.rows, plan.last.keys, plan.lanes))
        extra = extra.reshape(plan.keys, plan.lanes)
        s = jnp.where(extra > MASKED, s + extra, MASKED)
        top = jnp.maximum(s.max(0, keepdims=True), EMPTY)
        w = jnp.where(s <= EMPTY, 0.0, jnp.exp2(s - top))
        return w, jnp.maximum(w.sum(0, keepdims=True), 1e-37)

    def add(self, table_ref, t):
        """Adds `t [keys, lanes]` where `weights` read the table."""
        plan = self.plan
        t = t.reshape(len(self.distances), -1, plan.last.keys, plan.lanes)
        for i, at in enumerate(self.distances):
            table_ref[self.column_kind, at] += t[i]


def _roll(t, by: int):
    return compat.tpu().roll(t, by % LANES, 1)


def _skew(t, sign: int):
    """Row `i` of `t [8, LANES]` moved by `sign * i` lanes."""
    row = jax.lax.broadcasted_iota(jnp.int32, t.shape, 0)
    for bit in (1, 2, 4):
        t = jnp.where((row & bit) > 0, _roll(t, sign * bit), t)
    return t


def _fill(plan: Plan, masks, table_ref):
    """Writes `table [kinds, distances, keys, lanes]`: the columns' mask, plus the bias if any.

    Key `i` of a tile has the bias row moved by `i` lanes, and by the tile's own shift.
    """
    _, column_ref, rows_ref = masks
    _, shift, _ = plan.last.shifted_kinds

    def at_distance(distance, _):
        for h in range(plan.group):
            lanes = slice(h * LANES, (h + 1) * LANES)
            if rows_ref is not None:
                row = rows_ref[distance, :, lanes]
                row = _skew(jnp.broadcast_to(row, (8, LANES)), 1)
            for kind, start in enumerate(shift):
                for i in range(0, plan.last.keys, 8):
                    tile = column_ref[kind, i : i + 8]
                    if rows_ref is not None:
                        tile = tile + _roll(row, int(start) + i)
                    table_ref[kind, distance, i : i + 8, lanes] = tile
        return 0

    jax.lax.fori_loop(0, plan.distances, at_distance, 0)


def _fold(plan: Plan, table_ref, rows_ref):
    """The transpose of `_fill`: sums a gradient of the table into that of the bias rows."""
    _, shift, _ = plan.last.shifted_kinds

    def at_distance(distance, _):
        for h in range(plan.group):
            lanes = slice(h * LANES, (h + 1) * LANES)
            total = jnp.zeros((8, LANES), jnp.float32)
            for kind, start in enumerate(shift):
                for i in range(0, plan.last.keys, 8):
                    tile = table_ref[kind, distance, i : i + 8, lanes]
                    total = total + _roll(tile, -int(start) - i)
            rows_ref[distance, :, lanes] = _skew(total, -1).sum(0, keepdims=True)
        return 0

    jax.lax.fori_loop(0, plan.distances, at_distance, 0)
