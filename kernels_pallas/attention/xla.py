"""Attention in plain JAX: what CPU users run, and where the Pallas bodies bring nothing.

The forward pass goes over blocks of queries and keeps the output and the log-sum-exp; the backward
pass forms the weights again, block by block. Nothing of size queries x keys outlives a block, and
keys that a mask hides from a whole block are not read. A problem that fits into one block has no
loop at all. Both passes are ordinary differentiable code: derivatives of any order and mode work,
and blocks are formed again for them, too.

Scores of hidden keys are lowered by a minimum, not by a selection: XLA for CPUs runs products,
minimum, softmax and sums as one library call, but stops at a selection (a causal forward pass of
4 x 256 tokens takes a third of the time so).

Numbers that are not finite stay where they are seen (zero times infinity would be NaN). They count
as zero, as do numbers whose products may overflow (over 7e16 in float32), and rows that see one
become NaN at the end; in the backward pass so do the gradients of what such rows see. Where that
costs more than it brings (`exact`: few queries, whose cache is not copied for it, and gradients of
bias, slopes or modifiers), a selection keeps scores that are NaN from those who do not see them.

Letters: c b batch (example `c * len(b) + b` uses row b of the bias), n kv heads, g query heads of
one kv head, q queries, k keys, d head width. Axes b and g are left out where they are one: XLA for
CPUs fuses a whole block of attention only if the products have two batch axes and no reshape
stands between them.
"""

import copy
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.problem import Gradients, Operands, Problem, apart, hides
from kernels_pallas.masks import block_table
from kernels_pallas.scores import EMPTY, MASKED, distance, dropout_factor, modified

CPU_BLOCK_BYTES = 16 << 20
ACCELERATOR_BLOCK_BYTES = 512 << 20
MIN_SCORES = 256 * 256  # of one head: smaller blocks make slow matrix products
TWO_BLOCKS = 256  # queries, from which two blocks are faster than one if a mask hides keys of them
MIN_BLOCK = 128  # queries: blocks of fewer are not split any more
FEW_QUERIES = 8  # of a decoding step, whose scores are fewer than its cache's numbers


class Group:
    """A run of query blocks that read key ranges of one width, so that one loop serves them.

    Attributes:
      first: index of the first block.
      starts: first key of each block's range.
      width: keys in a range.
    """

    def __init__(self, first: int, starts: np.ndarray, width: int):
        self.first, self.starts, self.width = first, starts, width


def plan(problem: Problem, scores_per_row: int, queries: int, keys: int, block_bytes: int):
    """`(block, groups)`: rows of a block, and the groups of blocks with their key ranges."""
    if not isinstance(queries, int) or not isinstance(keys, int):
        return queries, [Group(0, np.zeros(1, int), keys)]  # of a length that export leaves open
    if not isinstance(scores_per_row, int):
        scores_per_row = 1
    rows = max(1, MIN_SCORES // keys, block_bytes // (4 * scores_per_row * keys))
    count = math.ceil(queries / rows)
    found = queries, [Group(0, np.zeros(1, int), keys)]
    if count > 1:
        found = split(problem, count, queries, keys)
    if block_bytes != CPU_BLOCK_BYTES or min(queries, keys) < TWO_BLOCKS:
        return found
    while found[0] > MIN_BLOCK:  # smaller blocks, as long as they read much fewer keys
        smaller = split(problem, 2 * count, queries, keys)
        if read(smaller) > (0.9 if count == 1 else 0.7) * read(found):
            break
        found, count = smaller, 2 * count
    return found


def read(found) -> int:
    """Scores of all blocks of a plan."""
    block, groups = found
    return sum(block * g.width * len(g.starts) for g in groups)


def split(problem: Problem, count: int, queries: int, keys: int):
    """`(block, groups)` of about `count` blocks, each with the keys that it sees."""
    block = math.ceil(queries / count)
    count = math.ceil(queries / block)
    step = 16 if keys >= 256 else keys
    some, _ = block_table(problem.table_mask, queries, keys, block, step)
    low = some.argmax(1) * step
    high = np.minimum((some.shape[1] - some[:, ::-1].argmax(1)) * step, keys)
    high = np.where(some.any(1), high, low + 1)
    groups = []
    for part in np.array_split(np.arange(count), min(4, count)):
        width = int((high - low)[part].max())
        groups.append(Group(int(part[0]), np.minimum(low[part], keys - width), width))
    if len({g.width for g in groups}) == 1:
        groups = [Group(0, np.concatenate([g.starts for g in groups]), groups[0].width)]
    return block, groups


class _Blocks:
    """The operands in grouped shapes, and the finished scores of any block of them."""

    def __init__(self, problem: Problem, x: Operands, block_bytes: int, exact: bool):
        batch, heads, self.queries, _ = x.query.shape
        kv_heads, self.keys = x.key.shape[1:3]
        static = problem if x.offsets is None else replace(problem, mask=None)
        self.block, self.groups = plan(static, batch * heads, self.queries, self.keys, block_bytes)
        self.count = len(np.concatenate([g.starts for g in self.groups]))
        self.problem = problem = problem.bound(x.captured)
        rows = 1 if x.bias is None else x.bias.shape[0]
        group = heads // kv_heads
        self.batch = (batch // rows, rows) if _several(rows) else (batch,)
        self.heads = (kv_heads, group) if group > 1 else (kv_heads,)
        kv = ("cb" if _several(rows) else "c") + "n"
        lead = kv + ("g" if group > 1 else "")
        self.by_key = f"{lead}qd,{kv}kd->{lead}qk"
        self.by_value = f"{lead}qk,{kv}kd->{lead}qd"
        self.by_rows = f"{lead}qk,{lead}qd->{kv}kd"
        self.lead, self.kv = lead, kv
        self.wide = jnp.promote_types(x.value.dtype, jnp.float32)
        self.guarded = hides(problem, x)
        self.exact = exact
        self.q = self.by_query(x.query)
        # of queries, which are few, not of scores; 16-bit queries would be rounded once more
        self.query_scale, self.score_scale = 1.0, problem.scale
        if self.q.dtype == self.wide:
            self.query_scale, self.score_scale = problem.scale, 1.0
        self.q = self.q * self.query_scale
        self.k, self.v = (t.reshape(*self.batch, *t.shape[1:]) for t in (x.key, x.value))
        self.q_clean, self.k_clean, self.finite = self.q, self.k, None
        if self.guarded:
            good = jnp.isfinite if exact else usable
            self.q_clean, self.k_clean = (jnp.where(good(t), t, 0) for t in (self.q, self.k))
            finite = good(self.v).all(-1, keepdims=True)
            self.v = jnp.where(finite, self.v, 0)
            if not exact:
                self.bad_q = ~good(self.q).all(-1, keepdims=True)
                self.bad_k = ~(good(self.k).all(-1, keepdims=True) & finite)
                self.q, self.k = self.q_clean, self.k_clean
            elif few(x):
                by_keys = finite.swapaxes(-1, -2)
                self.finite = by_keys[..., None, :, :] if group > 1 else by_keys
            else:
                self.k = jnp.where(finite, self.k, jnp.nan)
        self.bias = self.slopes = self.q_segments = self.k_segments = self.seeds = None
        if x.bias is not None:
            lead = (1, rows) if _several(rows) else (1,)
            per_head = self.heads if x.bias.shape[1] != 1 else (1,) * len(self.heads)
            self.bias = x.bias.reshape(*lead, *per_head, *x.bias.shape[2:])
            if x.bias.shape[2] != 1:
                self.bias = self.pad(self.bias)
        if x.slopes is not None:
            self.slopes = x.slopes.astype(self.wide).reshape(*self.heads, 1, 1)
        each = (*self.batch, *(1,) * len(self.heads))
        if x.query_segments is not None:
            self.q_segments = self.pad(x.query_segments.reshape(*each, self.queries, 1))
            self.k_segments = x.key_segments.reshape(*each, 1, self.keys)
        if x.seeds is not None:
            self.seeds = x.seeds.reshape(*self.batch, *self.heads, 1, 1)
        self.offset = problem.offset
        if x.offsets is not None:
            self.offset = problem.offset + x.offsets.reshape(*each, 1, 1)

    def by_query(self, t, fill=0):
        """`[batch, heads, queries, ...]` to `[c, b, n, g, queries padded to blocks, ...]`."""
        return self.pad(t.reshape(*self.batch, *self.heads, *t.shape[2:]), fill)

    def pad(self, t, fill=0):
        """Fill up axis -2, the queries, to whole blocks."""
        if self.count == 1:
            return t
        extra = self.count * self.block - self.queries
        widths = [(0, extra if axis == t.ndim - 2 else 0) for axis in range(t.ndim)]
        return jnp.pad(t, widths, constant_values=fill)

    def rows(self, t, i):
        """The queries of block `i` (axis -2)."""
        return t if self.count == 1 else _cut(t, i * self.block, self.block, axis=-2)

    def columns(self, t, start, width, axis=-2):
        """The keys of a range."""
        return t if self.count == 1 else _cut(t, start, width, axis)

    def over(self, body, carry):
        """`carry, outputs = body(carry, i, start, width)` over all blocks; outputs are joined."""
        if self.count == 1:
            return body(carry, 0, 0, self.keys)
        collected = []
        for group in self.groups:
            count = len(group.starts)
            once = jax.checkpoint(partial(body, width=group.width), prevent_cse=False)
            if count == 1:
                carry, out = once(carry, group.first, int(group.starts[0]))
                collected.append(out)
                continue
            indices = np.arange(group.first, group.first + count, dtype=np.int32)
            carry, out = jax.lax.scan(
                lambda carry, at, once=once: once(carry, *at),
                carry,
                (indices, group.starts.astype(np.int32)),
            )
            collected.append(jax.tree.map(_join_blocks, out))
        if len(collected) == 1:
            outputs = collected[0]
        else:
            outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *collected)
        return carry, jax.tree.map(lambda t: t[..., : self.queries, :], outputs)

    def indices(self, i, start, width):
        """Query and key index of a block, without the offset of the queries."""
        at_q = i * self.block + jnp.arange(self.block, dtype=jnp.int32)[:, None]
        return at_q, start + jnp.arange(width, dtype=jnp.int32)[None, :]

    def raw(self, i, start, width):
        """Scaled products of a block."""
        q, k = self.rows(self.q, i), self.columns(self.k, start, width)
        s = self.product(self.by_key, q, k) * self.score_scale
        if self.finite is not None:
            s = jnp.where(self.columns(self.finite, start, width, axis=-1), s, jnp.nan)
        return s

    def modified(self, raw, i, start, width):
        """Raw scores after cap, modifier and slopes."""
        at_q, at_k = self.indices(i, start, width)
        at_q = at_q + self.offset + self.problem.place
        s = modified(self.problem.score, raw, at_q, at_k)
        if self.slopes is not None:
            s = s - self.slopes * distance(at_q, at_k)
        return s

    def distance(self, i, start, width):
        """What the slopes multiply."""
        at_q, at_k = self.indices(i, start, width)
        return distance(at_q + self.offset + self.problem.place, at_k)

    def visible(self, i, start, width):
        """Which keys of a block are seen, of a shape that broadcasts; None: all of them."""
        visible = None
        if self.bias is not None:
            bias = self.columns(self.rows(self.bias, i), start, width, axis=-1)
            visible = bias if bias.dtype == bool else bias > MASKED
        if self.problem.mask is not None:
            at_q, at_k = self.indices(i, start, width)
            visible = _both(visible, self.problem.mask(at_q + self.offset, at_k))
        if self.q_segments is not None:
            k_segments = self.columns(self.k_segments, start, width, axis=-1)
            visible = _both(visible, self.rows(self.q_segments, i) == k_segments)
        return visible

    def finish(self, s, i, start, width):
        """Modified scores with bias, and `MASKED` where the key is not seen."""
        if self.bias is not None and self.bias.dtype != bool:
            s = s + self.columns(self.rows(self.bias, i), start, width, axis=-1).astype(s.dtype)
        if self.problem.score.modify is not None:
            s = jnp.maximum(s, MASKED)
        visible = self.visible(i, start, width)
        if visible is None:
            return s
        if self.exact:
            return jnp.where(visible, s, MASKED)
        return jnp.minimum(s, jnp.where(visible, jnp.inf, MASKED).astype(s.dtype))

    def reached(self, i, start, width):
        """`(rows that see a number that is not finite, keys that such rows see)`."""
        bad_q, bad_k = self.rows(self.bad_q, i), self.columns(self.bad_k, start, width)
        visible = self.visible(i, start, width)
        visible = jnp.broadcast_to(visible, (*visible.shape[:-2], bad_q.shape[-2], width))
        axes = [n for n in range(2 - visible.ndim, 0) if _several(visible.shape[n - 2])]
        letters = "".join(self.lead[n] for n in axes) + "qk"
        visible = visible.reshape(*(visible.shape[n - 2] for n in axes), *visible.shape[-2:])
        visible = visible.astype(self.wide)
        alike = "g" in self.lead and "g" not in letters  # every query head sees the same
        lead = self.kv if alike else self.lead

        def by_key(of):
            rows = jnp.einsum(f"{letters},{self.kv}k->{lead}q", visible, of.astype(self.wide)) > 0
            return (rows[..., None, :] if alike else rows)[..., None]

        rows = by_key(bad_k[..., 0]) | (bad_q & by_key(jnp.ones(bad_k.shape[:-1])))
        bad_rows = rows[..., 0].astype(self.wide)
        keys = jnp.einsum(f"{letters},{self.lead}q->{self.kv}k", visible, bad_rows)
        return rows, keys[..., None] > 0

    def product(self, letters, a, b):
        """A matrix product with a float32 result (float64 of float64)."""
        return jnp.einsum(
            letters, a, b, precision=self.problem.precision, preferred_element_type=self.wide
        )


def _several(rows) -> bool:
    """Whether a bias has rows of its own for examples (unknown numbers do)."""
    return not isinstance(rows, int) or rows > 1


def _both(a, b):
    return b if a is None else a & b


def _cut(t, start, width, axis):
    """`width` entries from `start`; all of a shorter or equal axis."""
    if t is None or t.shape[axis] <= width:
        return t
    return jax.lax.dynamic_slice_in_dim(t, start, width, axis=axis)


def _join_blocks(t):
    """`[blocks, ..., block, d]` to `[..., blocks * block, d]`."""
    t = jnp.moveaxis(t, 0, -3)
    return t.reshape(*t.shape[:-3], -1, t.shape[-1])


def selects(problem: Problem, x: Operands) -> bool:
    """Whether the backward pass has more to find than gradients of query, key and value."""
    score = problem.score
    by_score = score.cap is not None or score.modify is not None or score.clipped
    float_bias = x.bias is not None and x.bias.dtype != bool
    return by_score or float_bias or x.slopes is not None or x.captured is not None


def usable(t):
    """Where numbers are finite, and small enough that their products are."""
    return jnp.abs(t) < float(jnp.finfo(jnp.promote_types(t.dtype, jnp.float32)).max) ** 0.5 / 256


def few(x: Operands) -> bool:
    """Whether queries are those of a decoding step."""
    queries = x.query.shape[2]
    return isinstance(queries, int) and queries <= FEW_QUERIES


@partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def forward(
    problem: Problem,
    x: Operands,
    block_bytes: int = ACCELERATOR_BLOCK_BYTES,
    keep: bool = False,
):
    """Output in the value's type and log-sum-exp in float32 (zeros where there is none).

    With `keep` a backward pass follows. Log-sum-exps then end the one library call anyway.
    """
    exact = few(x) or problem.score.modify is not None or (keep and selects(problem, x))
    blocks = _Blocks(problem, x, block_bytes, exact)
    score, dtype = problem.score, x.value.dtype

    def body(carry, i, start, width):
        at = i, start, width
        s = blocks.finish(blocks.modified(blocks.raw(*at), *at), *at)
        v = blocks.columns(blocks.v, start, width)
        total = 1.0
        if score.normalised:
            top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
            if blocks.guarded:
                top = jnp.maximum(top, EMPTY)
            w = jnp.exp(s - top)  # zero in a row that sees no key, as EMPTY is above MASKED
            total = w.sum(-1, keepdims=True)
            if blocks.guarded:
                total = jnp.maximum(total, 1e-37)
            lse = top + jnp.log(total)
            if score.clipped:
                w, total = score.weight(s, lse), 1.0
        else:
            w = score.weight(s, None)
            lse = jnp.zeros((*w.shape[:-1], 1), blocks.wide)
        if problem.dropout:
            at_q, at_k = blocks.indices(*at)
            w = w * dropout_factor(problem.dropout, blocks.seeds, at_q, at_k, w.dtype)
        out = (blocks.product(blocks.by_value, w.astype(dtype), v) / total).astype(dtype)
        if blocks.guarded and not blocks.exact:
            rows, _ = blocks.reached(*at)
            out, lse = (jnp.where(rows, jnp.nan, t) for t in (out, lse))
        return carry, (out, lse)

    _, (out, lse) = blocks.over(body, ())
    lse = lse.reshape(x.query.shape[:3])
    if blocks.guarded:
        lse = jnp.where(lse <= EMPTY, MASKED, lse)
    return out.reshape(*x.query.shape[:3], -1), lse


@partial(jax.jit, static_argnums=(0, 6), inline=True)
def backward(
    problem: Problem,
    x: Operands,
    out,
    lse,
    d_out,
    d_lse,
    block_bytes: int = ACCELERATOR_BLOCK_BYTES,
) -> Gradients:
    """Gradients in the operands' types; sums over queries and examples are at least float32."""
    x, d_out = apart(problem, x, d_out)
    score, exact = problem.score, selects(problem, x)
    if hides(problem, x) and not exact:
        good = usable(d_out)
        query = jnp.where(good.all(-1, keepdims=True), x.query, jnp.nan)
        x, d_out = x._replace(query=query), jnp.where(good, d_out, 0)
    blocks = _Blocks(problem, x, block_bytes, exact)
    dtype, wide, selected = x.value.dtype, blocks.wide, blocks.guarded and exact
    if blocks.guarded and score.normalised:
        d_out = jnp.where((lse <= EMPTY)[..., None], 0, d_out)
    do = blocks.by_query(d_out)
    delta = (d_out.astype(wide) * out.astype(wide)).sum(-1) - d_lse
    if blocks.guarded:
        lse = jnp.where(lse <= EMPTY, 0.0, lse)
        if not exact:
            lse, delta = (jnp.where(jnp.isfinite(t), t, 0.0) for t in (lse, delta))
    delta, d_lse = (blocks.by_query(t[..., None]) for t in (delta, d_lse))
    lse = blocks.by_query(lse[..., None], fill=-MASKED)
    float_bias = blocks.bias is not None and blocks.bias.dtype != bool
    looped = blocks.count > 1

    def body(carry, i, start, width):
        dk, dv, d_slopes, d_captured = carry
        at = i, start, width
        raw = blocks.raw(*at)
        if score.cap is None and score.modify is None:
            s, pull = blocks.modified(raw, *at), None
        elif x.captured is None:
            along = partial(blocks.modified, i=i, start=start, width=width)
            s, slope = jax.jvp(along, (raw,), (jnp.ones_like(raw),))
            pull = lambda ds: (ds * slope,)  # noqa: E731
        else:
            s, pull = jax.vjp(partial(_modified_by, blocks, problem, at), raw, x.captured)
        s = blocks.finish(s, *at)
        q, do_i, lse_i = (blocks.rows(t, i) for t in (blocks.q_clean, do, lse))
        k, v = (blocks.columns(t, start, width) for t in (blocks.k_clean, blocks.v))
        w = score.weight(s, lse_i)
        if selected:  # a row that sees what is not finite is NaN where it sees, only
            hidden = s <= EMPTY
            w = jnp.where(hidden, 0.0, w)
        dw = blocks.product(blocks.by_key, do_i, v)
        if problem.dropout:
            at_q, at_k = blocks.indices(*at)
            factor = dropout_factor(problem.dropout, blocks.seeds, at_q, at_k, w.dtype)
            w_kept, dw = w * factor, dw * factor
        else:
            w_kept = w
        if score.clipped:
            if selected:  # products with what is hidden may be infinite
                dw = jnp.where(hidden, 0.0, dw)
            p, g = score.unclipped(s, lse_i, dw)
            delta_i = (p * g).sum(-1, keepdims=True) - blocks.rows(d_lse, i)
        else:
            delta_i = blocks.rows(delta, i)
        ds = score.gradient(s, lse_i, dw, delta_i)
        ds = jnp.where(hidden, 0.0, ds) if selected else ds
        d_raw = ds
        if pull is not None:
            d_raw, *more = pull(ds)
            if selected:
                d_raw = jnp.where(hidden, 0.0, d_raw)
            if more:
                d_captured = jax.tree.map(_sum_floats, d_captured, more[0])
        d_raw = (d_raw * blocks.score_scale).astype(dtype)
        dq = (blocks.product(blocks.by_value, d_raw, k) * blocks.query_scale).astype(dtype)
        dk_i = blocks.product(blocks.by_rows, d_raw, q)
        dv_i = blocks.product(blocks.by_rows, w_kept.astype(dtype), do_i)
        if blocks.guarded and not exact:
            rows, keys = blocks.reached(*at)
            dq = jnp.where(rows, jnp.nan, dq)
            dk_i, dv_i = (jnp.where(keys, jnp.nan, t) for t in (dk_i, dv_i))
        dk, dv = (_add(t, t_i, start, looped) for t, t_i in ((dk, dk_i), (dv, dv_i)))
        if d_slopes is not None:
            d_slopes = d_slopes - (ds * blocks.distance(*at)).sum(
                (*range(len(blocks.batch)), -2, -1)
            )
        d_bias = None
        if float_bias:
            axes = [a for a in range(ds.ndim) if _is_shared(blocks.bias.shape[a], ds.shape[a])]
            d_bias = ds.sum(axes, keepdims=True)
            if looped and d_bias.shape[-1] != 1 and width < blocks.keys:
                every = jnp.zeros((*d_bias.shape[:-1], blocks.keys), d_bias.dtype)
                d_bias = jax.lax.dynamic_update_slice_in_dim(every, d_bias, start, axis=-1)
        return (dk, dv, d_slopes, d_captured), (dq, d_bias)

    zeros = tuple(jnp.zeros(t.shape, wide) if looped else None for t in (blocks.k, blocks.v))
    no_slopes = None if x.slopes is None else jnp.zeros(blocks.heads, wide)
    none_captured = None
    if x.captured is not None:
        none_captured = jax.tree.map(
            lambda t: jnp.zeros(jnp.shape(t), jnp.promote_types(t.dtype, jnp.float32)), x.captured
        )
    start = (*zeros, no_slopes, none_captured)
    (dk, dv, d_slopes, d_captured), (dq, d_bias) = blocks.over(body, start)
    if float_bias:
        if x.bias.shape[2] == 1 and looped:
            d_bias = d_bias.sum(-2)
        d_bias = d_bias.reshape(x.bias.shape).astype(x.bias.dtype)
    return Gradients(
        dq.reshape(x.query.shape).astype(x.query.dtype),
        dk.reshape(x.key.shape).astype(x.key.dtype),
        dv.reshape(x.value.shape).astype(x.value.dtype),
        d_bias if float_bias else None,
        None if x.slopes is None else d_slopes.reshape(x.slopes.shape).astype(x.slopes.dtype),
        captured=d_captured,
    )


def _modified_by(blocks, problem, at, raw, captured):
    """Modified scores as a function of what the modifier closes over, too."""
    bound = copy.copy(blocks)
    bound.problem = problem.bound(captured)
    return bound.modified(raw, *at)


def _sum_floats(total, part):
    """The sum; gradients of integers stay zero."""
    return total if part.dtype == jax.dtypes.float0 else total + part


def _is_shared(own, full) -> bool:
    """Whether a bias is the same along an axis of the scores."""
    return isinstance(own, int) and own == 1 and not (isinstance(full, int) and full == 1)


def _add(total, part, start, looped):
    if not looped:
        return part
    if part.shape == total.shape:
        return total + part
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-2], axis=-2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=-2)
