"""One chunk of a linear recurrence on plain two-dimensional values: what bodies have in common.

With b_t the sum of the log decays up to and including step t of the chunk, z_s their sum after s,
and d_ts = b_t - b_s (t >= s):

    u = v                                                     linear attention
    u = (I + N)^-1 beta (v - e^b k S),  N_ts = beta_t k_t.k_s e^d_ts for s < t       delta rule
    o = scale (e^b q S + A u),          A_ts = q_t.k_s e^d_ts for s <= t
    S = e^(b_C) S + (k e^z)^T u

Every exponent is a sum of log decays of consecutive steps, formed without subtraction: nothing
overflows, and strong decays cost no digits.

Numbers that are not finite stay with the steps that see them: they count as zeros in all products,
where zero times infinity would carry them to earlier steps, and what a step sees decides which
outputs become NaN. A gate that forgets everything forgets them, too.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from kernels_pallas.recurrence.problem import Problem

# A decay of e^-10000 is zero; -inf would give 0 * inf in masked sums.
LOWEST_LOG_DECAY = -1e4
LARGEST_GATE = 80.0  # gates are at most zero; from here on, as from NaN, there is no decay
STRONGEST_WRITE = 1e6  # beta |k|^2 lies in [0, 2] where the delta rule is stable
SOLVE_BLOCK = 16


def step(problem: Problem, q, k, v, g, beta, state):
    """One chunk.

    Args:
      problem: static numbers.
      q: `[C, K]`.
      k: `[C, K]`.
      v: `[C, V]`.
      g: log decays, float32 `[C, 1]` or `[C, K]`, or None.
      beta: float32 `[C, 1]` for the delta rule, else None.
      state: float32 `[K, V]` before the chunk.

    Returns:
      `o` `[C, V]` in float32 and the state after the chunk.
    """
    product = partial(_product, v.dtype, problem.precision)
    row, column = indices(q.shape[0])
    q, k, v, g, beta, state, spoiled, sees = _spoiled(q, k, v, g, beta, state)
    vector = g is not None and g.shape[1] > 1
    if vector:
        prefix, suffix, total = column_sums(g)
        scores, decay = scores_by_halving(product, q, k, g), None
    else:
        decay, prefix, suffix, total = scalar_decays(g, *q.shape)
        scores = product(q, k, (1, 1))
    scores = jnp.where(sees.steps, scores, 0.0)
    good = jnp.isfinite(scores)  # products may overflow where the output's gradient is zero
    overflow = ~good.all(1, keepdims=True)
    scores = jnp.where(good, scores, 0.0)
    q_in, k_out = q * jnp.exp(prefix), k * jnp.exp(suffix)
    if g is not None:  # zero times what is huge and forgotten has gradients that are not finite
        q_in, k_out = jnp.where(sees.state, q_in, 0), jnp.where(sees.steps[-1:].T, k_out, 0)
    if decay is not None:
        scores = jnp.where(sees.steps, scores * decay, 0.0)
    u, written = v, None
    if beta is not None:
        n = beta * jnp.where(row > column, product(k, k, (1, 1)), 0.0) * decay
        k_in = jnp.where(sees.state, k * jnp.exp(prefix), 0)
        u = beta * (v - product(k_in, state, (1, 0)))
        u = exact(jnp.where(row >= column, inverse(n), 0.0), u)
        written = ~jnp.isfinite(u).all(1, keepdims=True)
        u = jnp.where(jnp.isfinite(u), u, 0.0)
    out = problem.scale * (product(q_in, state, (1, 0)) + product(scores, u, (1, 0)))
    after = product(k_out, u, (0, 0))
    after += jnp.exp(total) * (state if g is None else jnp.where(sees.state[-1:], state, 0.0))
    bad_out, bad_state = sees.reach(*spoiled)
    if written is not None:
        more_out, more_state = sees.reach(jnp.zeros_like(written), written, None)
        bad_out, bad_state = bad_out | more_out, bad_state | more_state
    nan = lambda bad: jnp.where(bad, jnp.nan, 0.0).astype(state.dtype)  # noqa: E731
    return out + nan(bad_out | overflow), after + nan(bad_state)


class _Sees(NamedTuple):
    """What gates leave of earlier steps.

    Attributes:
      steps: `[C, C]`: whether a step sees another.
      state: `[C, 1]`: whether it sees the state before the chunk.
    """

    steps: Bool[Array, "C C"]
    state: Bool[Array, "C 1"]

    def reach(self, read, write, lost):
        """Outputs `[C, V or 1]` and columns of the state after `[1, V or 1]` that are spoiled.

        Args:
          read: `[C, 1]`: steps whose own output is.
          write: `[C, 1]`: steps that spoil what sees them.
          lost: `[1, V]`: columns of the state before the chunk, or None.
        """
        seen = (self.steps & write.T).any(1, keepdims=True)
        if lost is not None:
            seen |= self.state & lost
        return read | seen, seen[-1:]


def _spoiled(q, k, v, g, beta, state):
    """The operands with zeros where they are not finite, what `_Sees.reach` takes, and `_Sees`."""
    row, column = indices(q.shape[0])
    read, write = ~jnp.isfinite(q).all(1, keepdims=True), ~jnp.isfinite(v).all(1, keepdims=True)
    good = jnp.isfinite(k)
    sees, kept = row >= column, jnp.ones_like(read)
    if beta is not None:
        beta = jnp.where(jnp.isfinite(beta), beta, jnp.inf)
        length = jnp.square(k.astype(state.dtype)).sum(1, keepdims=True)
        strong = jnp.abs(beta) * jnp.maximum(length, 1.0)
        good &= strong < STRONGEST_WRITE
        beta = jnp.where(strong < STRONGEST_WRITE, beta, 0.0)
    if g is not None:
        decays = g < LARGEST_GATE
        write |= ~decays.all(1, keepdims=True)
        g = jnp.where(decays, g, 0.0)
        cut = (g.max(1, keepdims=True) <= LOWEST_LOG_DECAY).astype(jnp.float32)
        across = jnp.where(row == column, cut, 0.0).sum(0, keepdims=True)
        cuts = jnp.where(row >= column, across, 0.0).sum(1, keepdims=True)  # up to each step
        sees &= cuts == jnp.where(row <= column, cut, 0.0).sum(0, keepdims=True)
        kept = cuts == 0
    q, v = (jnp.where(jnp.isfinite(t), t, 0) for t in (q, v))
    write |= ~good.all(1, keepdims=True)
    k = jnp.where(good, k, 0)
    lost = ~jnp.isfinite(state).all(0, keepdims=True)
    state = jnp.where(jnp.isfinite(state), state, 0.0)
    return q, k, v, g, beta, state, (read, write, lost), _Sees(sees, kept)


def _product(dtype, precision, a, b, contract):
    """`a b` over one axis each, operands in `dtype`, result in float32."""
    dims = ((contract[:1], contract[1:]), ((), ()))
    if dtype == jnp.bfloat16:
        precision = None  # products of bfloat16 are exact in float32
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        dims,
        precision=precision,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


def exact(a, b):
    """`a b` in full float32, or float64 of float64."""
    return _product(b.dtype, lax.Precision.HIGHEST, a, b, (1, 0))


def indices(size: int):
    """Row and column index of a `[size, size]` tile."""
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def as_column(row):
    """`[1, n]` to `[n, 1]`."""
    i, j = indices(row.shape[1])
    return jnp.where(i == j, row, 0.0).sum(1, keepdims=True)


def scalar_decays(g, size: int, keys: int):
    """Decays e^d `[C, C]` (zero above the diagonal), b and z `[C, 1]`, b_C in a column `[K, 1]`."""
    row, column = indices(size)
    causal = row >= column
    if g is None:
        zero = jnp.zeros((size, 1), jnp.float32)
        return causal.astype(jnp.float32), zero, zero, jnp.zeros((keys, 1), jnp.float32)
    between = exact(causal.astype(jnp.float32), jnp.where(causal & (row != column), g, 0.0))
    across = jnp.where(row == column, g, 0.0).sum(0, keepdims=True)
    prefix = jnp.where(causal, across, 0.0).sum(1, keepdims=True)
    suffix = jnp.where(causal, 0.0, across).sum(1, keepdims=True)
    decay = jnp.where(causal, jnp.exp(jnp.where(causal, between, 0.0)), 0.0)
    total = jnp.broadcast_to(across, (keys, size)).sum(1, keepdims=True)
    return decay, prefix, suffix, total


def column_sums(g):
    """Sums b and z `[C, K]`, and b_C as a column `[K, 1]`, of log decays per key channel."""
    row, column = indices(g.shape[0])
    prefix = exact((row >= column).astype(jnp.float32), g)
    suffix = exact((row < column).astype(jnp.float32), g)
    return prefix, suffix, as_column(g.sum(0, keepdims=True))


def scores_by_halving(product, q, k, g):
    """A_ts = sum_c q_tc k_sc e^(d_tsc) for s <= t, by halving.

    A pair t > s is told apart at exactly one of the scales 1, 2, 4 ... C/2: s in the first, t in
    the second half of a block. There d_ts is what follows s in its half plus what leads to t in
    its own, so that the sum over channels is a matrix product with both exponents <= 0.
    """
    size = q.shape[0]
    scores = _same_step(q, k)
    for level in range(size.bit_length() - 1):
        scores = scores + _of_level(product, level, q, k, g)
    return scores


def _same_step(q, k):
    row, column = indices(q.shape[0])
    product = q * k
    product = product.astype(jnp.promote_types(product.dtype, jnp.float32))
    return jnp.where(row == column, product.sum(1, keepdims=True), 0.0)


def _of_level(product, level, q, k, g):
    row, column = indices(q.shape[0])
    same = (row >> level) == (column >> level)
    leading = exact((same & (row >= column)).astype(jnp.float32), g)
    following = exact((same & (row < column)).astype(jnp.float32), g)
    part = product(q * jnp.exp(leading), k * jnp.exp(following), (1, 1))
    return jnp.where(_halves(row, column, level), part, 0.0)


def _halves(row, column, level):
    """Whether row and column are in the second and the first half of one block of `2 << level`."""
    row, column = row >> level, column >> level
    return (row == column + 1) & (row & 1 == 1)


@jax.custom_jvp
def inverse(n):
    """(I + n)^-1 of a strictly lower `[C, C]`, float32, accurate for any n.

    Forward substitution inside diagonal blocks of 16, all blocks at once, then pairwise merges
    T21 = -T22 N21 T11. (Products of powers of n lose all digits where keys are alike.)
    """
    size = n.shape[0]
    row, column = indices(size)
    block = min(SOLVE_BLOCK, size)
    blocks = (size // block, block, size)
    inside = jnp.where(row // block == column // block, n, 0.0)
    x = (row == column).astype(n.dtype).reshape(blocks)
    at = lax.broadcasted_iota(jnp.int32, blocks, 1)

    def substitute(s, x):
        factor = jnp.where(column % block == s, inside, 0.0).sum(1, keepdims=True)
        done = jnp.where(at == s, x, 0.0).sum(1, keepdims=True)
        return x - factor.reshape(*blocks[:2], 1) * done

    x = lax.fori_loop(0, block - 1, substitute, x)
    x = x.reshape(size, size)
    while block < size:
        below = jnp.where(_halves(row, column, block.bit_length() - 1), n, 0.0)
        x = x - exact(x, exact(below, x))
        block *= 2
    return x


@inverse.defjvp
def _inverse_jvp(primals, tangents):
    x = inverse(*primals)
    return x, -exact(x, exact(tangents[0], x))
