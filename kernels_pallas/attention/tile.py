"""What the Pallas bodies share: block tables, and the arithmetic of one tile on plain values."""

import math
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.masks import block_table
from kernels_pallas.scores import EMPTY, MASKED, distance, dropout_factor, modified_with_slope

SKIP, PARTIAL, FULL = 0, 1, 2


class Axis(NamedTuple):
    """A length cut into blocks: `length` tokens, padded to `count * block`."""

    length: int
    block: int
    count: int

    @property
    def padded(self) -> int:
        """Tokens in the padded array."""
        return self.count * self.block


def cut(length: int, limit: int, multiple: int) -> Axis:
    """One block of any length up to `limit`, else equal blocks of a multiple of `multiple`.

    Fewer than 16 tokens are padded: matrix units have no smaller operands.
    """
    if length <= limit:
        return Axis(length, max(length, 16), 1)
    count = math.ceil(length / limit)
    block = math.ceil(length / count / multiple) * multiple
    return Axis(length, block, math.ceil(length / block))


class Table(NamedTuple):
    """Which blocks of one axis each block of the other visits.

    Attributes:
      index: int32 `[rows * width]`, block to visit; the last one repeats where a row has fewer.
      flag: int32 `[rows * width]`: SKIP, PARTIAL (needs the mask) or FULL.
      width: visits of a row.
    """

    index: np.ndarray
    flag: np.ndarray
    width: int


@lru_cache(maxsize=256)
def flags(mask, q: Axis, k: Axis) -> np.ndarray:
    """SKIP, PARTIAL or FULL for each (q block, k block). Padding keys make a block partial."""
    some, every = block_table(mask, q.length, k.length, q.block, k.block)
    every = every.copy()
    if k.padded > k.length:
        every[:, -1] = False
    return np.where(some, np.where(every, FULL, PARTIAL), SKIP).astype(np.int32)


def table(flag: np.ndarray) -> Table:
    """The visits of each row of a flag matrix, invisible ones left out."""
    width = max(1, int((flag != SKIP).sum(1).max()))
    index = np.zeros((len(flag), width), np.int32)
    kept = np.zeros((len(flag), width), np.int32)
    for row, states in enumerate(flag):
        visits = np.flatnonzero(states)
        index[row, : len(visits)] = visits
        index[row, len(visits) :] = visits[-1] if len(visits) else 0
        kept[row, : len(visits)] = states[visits]
    return Table(index.ravel(), kept.ravel(), width)


def with_segments(found: Table, x: Operands, q: Axis, k: Axis, *, by_key: bool):
    """`[batch * rows * width]` flags of a table: SKIP also where segments of blocks cannot meet."""
    if x.query_segments is None:
        return jnp.asarray(found.flag)

    def ranges(segments, axis):
        extra = axis.padded - axis.length
        padded = jnp.pad(segments, ((0, 0), (0, extra)), mode="edge")
        blocks = padded.reshape(len(segments), axis.count, axis.block)
        return blocks.min(-1), blocks.max(-1)

    (q_low, q_high), (k_low, k_high) = ranges(x.query_segments, q), ranges(x.key_segments, k)
    meet = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    same = (q_low == q_high)[:, :, None] & (k_low == k_high)[:, None]
    same &= q_low[:, :, None] == k_low[:, None]
    if by_key:
        meet, same = meet.swapaxes(1, 2), same.swapaxes(1, 2)
    index = found.index.reshape(1, -1, found.width)
    meet, same = (jnp.take_along_axis(t, jnp.asarray(index), axis=2) for t in (meet, same))
    flag = jnp.asarray(found.flag).reshape(index.shape)
    flag = jnp.where(meet, jnp.where(same, flag, jnp.minimum(flag, PARTIAL)), SKIP)
    return flag.astype(jnp.int32).ravel()


class Tile(NamedTuple):
    """One tile of scores: queries in rows, or in columns when transposed.

    Attributes:
      at_q, at_k: token indices, shaped to broadcast over the tile.
      bias: additive, in the tile's orientation.
      slope: ALiBi's, of this head.
      q_segments, k_segments: shaped like the indices.
      seed: dropout's, of this batch and head.
      masked: whether the mask must be applied (a PARTIAL block).
      keys: real keys, those after are padding.
    """

    at_q: jax.Array
    at_k: jax.Array
    bias: jax.Array | None = None
    slope: jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    seed: jax.Array | None = None
    masked: bool = True
    keys: int | None = None

    def guarded(self, problem: Problem) -> bool:
        """Whether an entry of the tile may be hidden."""
        return self.masked or self.bias is not None or problem.score.modify is not None

    def distance(self, problem: Problem):
        """What the slopes multiply."""
        return distance(self.at_q + (problem.offset + problem.place), self.at_k)

    def finish(self, problem: Problem, raw):
        """Finished scores from products `q.k`, and the slope of their modifiers."""
        at_q = self.at_q + problem.offset if problem.offset else self.at_q
        placed = at_q + problem.place if problem.place else at_q
        s, slope = modified_with_slope(problem.score, raw * problem.scale, placed, self.at_k)
        if self.slope is not None:
            s = s - self.slope * self.distance(problem)
        if self.bias is not None:
            bias = self.bias.astype(jnp.float32)
            s = jnp.where(bias > MASKED, s + bias, MASKED)
        if problem.score.modify is not None:
            s = jnp.maximum(s, MASKED)
        if self.masked:
            if problem.mask is not None:
                s = jnp.where(problem.mask(at_q, self.at_k), s, MASKED)
            if self.q_segments is not None:
                s = jnp.where(self.q_segments == self.k_segments, s, MASKED)
            if self.keys is not None:
                s = jnp.where(self.at_k < self.keys, s, MASKED)
        return s, slope

    def drop(self, problem: Problem, t):
        """`t` with dropout's factor, if there is any."""
        if not problem.dropout:
            return t
        return t * dropout_factor(problem.dropout, self.seed, self.at_q, self.at_k)

    def gradients(self, problem: Problem, raw, dw, lse, delta):
        """`(weights for dv, gradient of the finished score, gradient of q.k)`."""
        s, slope = self.finish(problem, raw)
        guarded = self.guarded(problem)
        if guarded:  # padded rows, whose log-sum-exp is huge, see nothing
            s = jnp.where(lse >= -EMPTY, MASKED, s)
        w = self.drop(problem, problem.score.weight(s, lse))
        dw = self.drop(problem, dw)
        if guarded:  # products with what is hidden may be infinite, rows that see NaN are NaN
            hidden = s <= EMPTY
            w, dw = jnp.where(hidden, 0.0, w), jnp.where(hidden, 0.0, dw)
            slope = None if slope is None else jnp.where(hidden, 0.0, slope)
        ds = problem.score.gradient(s, lse, dw, delta)
        ds = jnp.where(hidden, 0.0, ds) if guarded else ds
        d_raw = ds * problem.scale if slope is None else ds * slope * problem.scale
        return w, ds, d_raw

    def clipped_delta(self, problem: Problem, raw, dw, lse):
        """`p * g` of a clipped softmax, whose row sums its gradient needs."""
        s, _ = self.finish(problem, raw)
        if self.guarded(problem):
            dw = jnp.where(s > EMPTY, dw, 0.0)
        p, g = problem.score.unclipped(s, lse, self.drop(problem, dw))
        return p * g

    def finite(self, problem: Problem, t):
        """A block with zeros where it is not finite, for products with zero weights."""
        return finite(t) if self.guarded(problem) else t

    def key(self, problem: Problem, key, value):
        """A block of keys, NaN where the value is not finite: rows that see it become NaN."""
        return marked(key, value) if self.guarded(problem) else key


LARGEST = float(np.finfo(np.float32).max)


def _is_finite(t):
    return jnp.abs(t) <= LARGEST


def finite(t):
    """Zeros where a block is not finite, by way of float32, which all chips compare."""
    wide = t.astype(jnp.float32)
    return jnp.where(_is_finite(wide), wide, 0.0).astype(t.dtype)


def marked(key, value):
    """A block of keys, NaN where the value is not finite."""
    good = jnp.where(_is_finite(value.astype(jnp.float32)), 1.0, 0.0).min(1, keepdims=True)
    return jnp.where(good > 0, key.astype(jnp.float32), jnp.nan).astype(key.dtype)


def seen_only(w, t):
    """`t` where weights are not zero, else zero, whatever `t` is there."""
    return jnp.where(w == 0.0, 0.0, t)


def quotient(a, b: int):
    """`a // b` of an index; `//` also rounds negative numbers down, which Triton lacks."""
    return a if b == 1 else jax.lax.div(a, jnp.int32(b))


def remainder(a, b: int):
    """`a % b` of an index; `%` also mends signs, for which Mosaic asks what chip it is."""
    return 0 if b == 1 else jax.lax.rem(a, jnp.int32(b))


def additive(bias):
    """A bias as numbers: booleans become 0 and -1e30."""
    if bias is None or bias.dtype != bool:
        return bias
    return jnp.where(bias, 0.0, MASKED).astype(jnp.bfloat16)


def dot(a, b, contract, precision):
    """Product of two matrices over one axis of each, with a float32 result."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def pad_length(t, axis: Axis, at: int, fill=0):
    """A fill value up to whole blocks on one axis; an axis of one entry that all share stays."""
    if t is None or axis.padded == axis.length or (t.shape[at] == 1 != axis.length):
        return t
    widths = [(0, axis.padded - axis.length if a == at else 0) for a in range(t.ndim)]
    return jnp.pad(t, widths, constant_values=fill)


def row_statistics(problem: Problem, x: Operands, out, lse, d_out, d_lse):
    """`(d_out, lse, delta)` of the backward pass.

    Rows that see nothing get no gradient, and a log-sum-exp for which exp(masked - lse) is zero.
    `delta` is `sum(d_out * out) - d_lse`, or what clipped softmax starts from.
    """
    if problem.score.normalised:
        empty = lse <= EMPTY
        d_out = jnp.where(empty[..., None], 0, d_out)
        lse = jnp.where(empty, 0.0, lse)
    if problem.score.clipped:
        return d_out, lse, -d_lse
    return d_out, lse, (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
