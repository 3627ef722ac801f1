"""Attention in plain JAX: what CPU users run, and where the Pallas bodies bring nothing.

The forward pass goes over blocks of queries and keeps the output and the log-sum-exp; the backward
pass forms the weights again, block by block. Nothing of size queries x keys outlives a block, and
keys that a mask hides from a whole block are not read. A problem that fits into one block has no
loop at all. Both passes are ordinary differentiable code: second derivatives work.

Letters: c b batch (example `c * len(b) + b` uses row b of the bias), n kv heads, g query heads of
one kv head, q queries, k keys, d head width. Axes b and g are left out where they are one: XLA for
CPUs fuses a whole block of attention only if the products have two batch axes and no reshape
stands between them.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.problem import Gradients, Operands, Problem
from kernels_pallas.masks import block_table
from kernels_pallas.scores import EMPTY, MASKED, distance, dropout_factor, modified_with_slope

CPU_BLOCK_BYTES = 16 << 20
ACCELERATOR_BLOCK_BYTES = 512 << 20
MIN_SCORES = 256 * 256  # of one head: smaller blocks make slow matrix products


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
    rows = max(1, MIN_SCORES // keys, block_bytes // (4 * scores_per_row * keys))
    count = math.ceil(queries / rows)
    block = math.ceil(queries / count)
    count = math.ceil(queries / block)
    if count == 1:
        return block, [Group(0, np.zeros(1, int), keys)]
    step = 16 if keys >= 256 else keys
    some, _ = block_table(problem.mask, queries, keys, block, step)
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

    def __init__(self, problem: Problem, x: Operands, block_bytes: int):
        self.problem = problem
        batch, heads, self.queries, _ = x.query.shape
        kv_heads, self.keys = x.key.shape[1:3]
        rows = 1 if x.bias is None else x.bias.shape[0]
        group = heads // kv_heads
        self.batch = (batch // rows, rows) if rows > 1 else (batch,)
        self.heads = (kv_heads, group) if group > 1 else (kv_heads,)
        kv = ("cb" if rows > 1 else "c") + "n"
        lead = kv + ("g" if group > 1 else "")
        self.by_key = f"{lead}qd,{kv}kd->{lead}qk"
        self.by_value = f"{lead}qk,{kv}kd->{lead}qd"
        self.by_rows = f"{lead}qk,{lead}qd->{kv}kd"
        self.block, self.groups = plan(problem, batch * heads, self.queries, self.keys, block_bytes)
        self.count = math.ceil(self.queries / self.block)
        self.q = self.by_query(x.query)
        self.k, self.v = (t.reshape(*self.batch, *t.shape[1:]) for t in (x.key, x.value))
        self.bias = self.slopes = self.q_segments = self.k_segments = self.seeds = None
        if x.bias is not None:
            lead = (1, rows) if rows > 1 else (1,)
            per_head = self.heads if x.bias.shape[1] > 1 else (1,) * len(self.heads)
            self.bias = self.pad(x.bias.reshape(*lead, *per_head, self.queries, self.keys))
        if x.slopes is not None:
            self.slopes = x.slopes.astype(jnp.float32).reshape(*self.heads, 1, 1)
        if x.query_segments is not None:
            lead = (*self.batch, *(1,) * len(self.heads))
            self.q_segments = self.pad(x.query_segments.reshape(*lead, self.queries, 1))
            self.k_segments = x.key_segments.reshape(*lead, 1, self.keys)
        if x.seeds is not None:
            self.seeds = x.seeds.reshape(*self.batch, *self.heads, 1, 1)
        # whether some row may see no key at all
        self.guarded = not (problem.mask is None and x.bias is None and x.query_segments is None)

    def by_query(self, t, fill=0):
        """`[batch, heads, queries, ...]` to `[c, b, n, g, queries padded to blocks, ...]`."""
        return self.pad(t.reshape(*self.batch, *self.heads, *t.shape[2:]), fill)

    def pad(self, t, fill=0):
        """Fill up axis -2, the queries, to whole blocks."""
        extra = self.count * self.block - self.queries
        if not extra:
            return t
        widths = [(0, extra if axis == t.ndim - 2 else 0) for axis in range(t.ndim)]
        return jnp.pad(t, widths, constant_values=fill)

    def rows(self, t, i):
        """The queries of block `i` (axis -2)."""
        return _cut(t, i * self.block, self.block, axis=-2)

    def over(self, body, carry):
        """`carry, outputs = body(carry, i, start, width)` over all blocks; outputs are joined."""
        collected = []
        for group in self.groups:
            count = len(group.starts)
            if count == 1:
                carry, out = body(carry, group.first, int(group.starts[0]), group.width)
                collected.append(out)
                continue
            indices = np.arange(group.first, group.first + count, dtype=np.int32)
            carry, out = jax.lax.scan(
                lambda carry, at, width=group.width: body(carry, at[0], at[1], width),
                carry,
                (indices, group.starts.astype(np.int32)),
            )
            collected.append(jax.tree.map(_join_blocks, out))
        if len(collected) == 1:
            outputs = collected[0]
        else:
            outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *collected)
        return carry, jax.tree.map(lambda t: t[..., : self.queries, :], outputs)

    def scores(self, i, start, width):
        """Finished scores of block `i`, the slope of their modifiers, and the two index arrays."""
        problem = self.problem
        q, k = self.rows(self.q, i), _cut(self.k, start, width, axis=-2)
        at_q = i * self.block + jnp.arange(self.block)[:, None]
        at_k = start + jnp.arange(width)[None, :]
        raw = self.product(self.by_key, q, k) * problem.scale
        s, slope = modified_with_slope(problem.score, raw, at_q, at_k)
        if self.slopes is not None:
            s = s - self.slopes * distance(at_q, at_k)
        visible = None
        if self.bias is not None:
            bias = _cut(self.rows(self.bias, i), start, width, axis=-1)
            if bias.dtype == bool:
                visible = bias
            else:
                s = jnp.maximum(s + bias.astype(s.dtype), MASKED)
        if problem.mask is not None:
            visible = _both(visible, problem.mask(at_q, at_k))
        if self.q_segments is not None:
            k_segments = _cut(self.k_segments, start, width, axis=-1)
            visible = _both(visible, self.rows(self.q_segments, i) == k_segments)
        if visible is not None:
            s = jnp.where(visible, s, MASKED)
        return s, slope, at_q, at_k

    def product(self, letters, a, b):
        """A matrix product with a float32 result (float64 of float64)."""
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.einsum(
            letters, a, b, precision=self.problem.precision, preferred_element_type=wide
        )


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


@partial(jax.jit, static_argnums=(0, 2), inline=True)
def forward(problem: Problem, x: Operands, block_bytes: int = ACCELERATOR_BLOCK_BYTES):
    """Output in the value's type and log-sum-exp in float32 (zeros where there is none)."""
    blocks = _Blocks(problem, x, block_bytes)
    score, dtype = problem.score, x.value.dtype

    def body(carry, i, start, width):
        s, _, at_q, at_k = blocks.scores(i, start, width)
        v = _cut(blocks.v, start, width, axis=-2)
        total = 1.0
        if score.normalised:
            top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
            if blocks.guarded:
                top = jnp.maximum(top, EMPTY)
            w = jnp.exp(s - top)
            total = w.sum(-1, keepdims=True)
            if blocks.guarded:
                total = jnp.maximum(total, 1e-37)
            lse = top + jnp.log(total)
            if score.clipped:
                w, total = score.weight(s, lse), 1.0
        else:
            w = score.weight(s, None)
            lse = jnp.zeros((*w.shape[:-1], 1), jnp.float32)
        if problem.dropout:
            w = w * dropout_factor(problem.dropout, blocks.seeds, at_q, at_k)
        out = blocks.product(blocks.by_value, w.astype(dtype), v) / total
        return carry, (out.astype(dtype), lse)

    _, (out, lse) = blocks.over(body, ())
    lse = lse.reshape(x.query.shape[:3])
    if blocks.guarded:
        lse = jnp.where(lse > EMPTY, lse, MASKED)
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
    """Gradients in the operands' types; sums over queries and examples are float32."""
    blocks = _Blocks(problem, x, block_bytes)
    score, dtype = problem.score, x.value.dtype
    d_out = d_out.astype(dtype)
    do = blocks.by_query(d_out)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta = blocks.by_query((delta - d_lse)[..., None])
    d_lse = blocks.by_query(d_lse[..., None])
    if blocks.guarded:
        lse = jnp.where(lse > EMPTY, lse, 0.0)
    lse = blocks.by_query(lse[..., None], fill=-MASKED)
    float_bias = blocks.bias is not None and blocks.bias.dtype != bool
    looped = blocks.count > 1

    def body(carry, i, start, width):
        dk, dv, d_slopes = carry
        s, slope, at_q, at_k = blocks.scores(i, start, width)
        q, do_i, lse_i = (blocks.rows(t, i) for t in (blocks.q, do, lse))
        k, v = (_cut(t, start, width, axis=-2) for t in (blocks.k, blocks.v))
        w = score.weight(s, lse_i)
        dw = blocks.product(blocks.by_key, do_i, v)
        if problem.dropout:
            factor = dropout_factor(problem.dropout, blocks.seeds, at_q, at_k)
            w_kept, dw = w * factor, dw * factor
        else:
            w_kept = w
        if score.clipped:
            p, g = score.unclipped(s, lse_i, dw)
            delta_i = (p * g).sum(-1, keepdims=True) - blocks.rows(d_lse, i)
        else:
            delta_i = blocks.rows(delta, i)
        ds = score.gradient(s, lse_i, dw, delta_i)
        raw = (ds if slope is None else ds * slope) * problem.scale
        raw = raw.astype(dtype)
        dq = blocks.product(blocks.by_value, raw, k).astype(dtype)
        dk_i = blocks.product(blocks.by_rows, raw, q)
        dv_i = blocks.product(blocks.by_rows, w_kept.astype(dtype), do_i)
        dk, dv = (_add(t, t_i, start, looped) for t, t_i in ((dk, dk_i), (dv, dv_i)))
        if d_slopes is not None:
            d_slopes = d_slopes - (ds * distance(at_q, at_k)).sum(
                (*range(len(blocks.batch)), -2, -1)
            )
        d_bias = None
        if float_bias:
            axes = [a for a in range(ds.ndim - 2) if blocks.bias.shape[a] < ds.shape[a]]
            d_bias = ds.sum(axes, keepdims=True)
            if width < blocks.keys:
                wide = jnp.zeros((*d_bias.shape[:-1], blocks.keys), d_bias.dtype)
                d_bias = jax.lax.dynamic_update_slice_in_dim(wide, d_bias, start, axis=-1)
        return (dk, dv, d_slopes), (dq, d_bias)

    zeros = tuple(jnp.zeros(t.shape, jnp.float32) if looped else None for t in (blocks.k, blocks.v))
    no_slopes = None if x.slopes is None else jnp.zeros(blocks.heads, jnp.float32)
    (dk, dv, d_slopes), (dq, d_bias) = blocks.over(body, (*zeros, no_slopes))
    return Gradients(
        dq.reshape(x.query.shape).astype(x.query.dtype),
        dk.reshape(x.key.shape).astype(x.key.dtype),
        dv.reshape(x.value.shape).astype(x.value.dtype),
        d_bias.reshape(x.bias.shape).astype(x.bias.dtype) if float_bias else None,
        None if x.slopes is None else d_slopes.reshape(x.slopes.shape).astype(x.slopes.dtype),
    )


def _add(total, part, start, looped):
    if not looped:
        return part
    if part.shape == total.shape:
        return total + part
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-2], axis=-2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=-2)
