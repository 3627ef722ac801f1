"""One chunk of a linear recurrence on plain two-dimensional values: shared by XLA, TPU and GPU.

With b_t the sum of the log decays up to and including step t of the chunk, z_s their sum after s,
and d_ts = b_t - b_s (t >= s):

    u = v                                                     linear attention
    u = (I + N)^-1 beta (v - e^b k S),  N_ts = beta_t k_t.k_s e^d_ts for s < t       delta rule
    o = scale (e^b q S + A u),          A_ts = q_t.k_s e^d_ts for s <= t
    S = e^(b_C) S + (k e^z)^T u

Every exponent is a sum of log decays of consecutive steps, formed without subtraction: nothing
overflows, and strong decays cost no digits. There is no slicing and no gather, only masks made of
indices, products and reductions, so that the functions and their derivatives lower everywhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.recurrence.problem import Problem

# A decay of e^-10000 is zero; -inf would give 0 * inf in masked sums.
LOWEST_LOG_DECAY = -1e4
SOLVE_BLOCK = 16


def step(problem: Problem, q, k, v, g, beta, state, product=None, vector_scores=None):
    """One chunk.

    Args:
      problem: static numbers.
      q: `[C, K]`.
      k: `[C, K]`.
      v: `[C, V]`.
      g: log decays, float32 `[C, 1]` or `[C, K]`, or None.
      beta: float32 `[C, 1]` for the delta rule, else None.
      state: float32 `[K, V]` before the chunk.
      product: `(a, b, contract)` of the large products; None multiplies in the type of `v`.
      vector_scores: how scores with decays of channels are formed; None is `scores_by_halving`.

    Returns:
      `o` `[C, V]` in float32 and the state after the chunk.
    """
    product = product or partial(_product, v.dtype, problem.precision)
    vector = g is not None and g.shape[1] > 1
    if vector:
        prefix, suffix, total = column_sums(g)
        scores = (vector_scores or scores_by_halving)(product, q, k, g)
        q_in, k_out = q * jnp.exp(prefix), k * jnp.exp(suffix)
    else:
        decay, prefix, suffix, total = scalar_decays(g, *q.shape)
        scores = product(q, k, (1, 1)) * decay
        q_in, k_out = q * jnp.exp(prefix), k * jnp.exp(suffix)
    if beta is None:
        u = v
    else:
        row, column = indices(q.shape[0])
        n = jnp.where(row > column, beta * product(k, k, (1, 1)) * decay, 0.0)
        u = beta * (v - product(k * jnp.exp(prefix), state, (1, 0)))
        u = exact(inverse(n), u)
    out = problem.scale * (product(q_in, state, (1, 0)) + product(scores, u, (1, 0)))
    return out, jnp.exp(total) * state + product(k_out, u, (0, 0))


def _product(dtype, precision, a, b, contract):
    """`a b` over one axis each, operands in `dtype`, result in float32."""
    dims = ((contract[:1], contract[1:]), ((), ()))
    if dtype == jnp.bfloat16:
        precision = None  # products of bfloat16 are exact in float32; Mosaic refuses other words
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        dims,
        precision=precision,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 4))
def product_of_one_type(dtype, precision, a, b, contract):
    """`a b` whose derivatives, too, multiply operands in `dtype` only."""
    return _product(dtype, precision, a, b, contract)


def _one_type_forward(dtype, precision, a, b, contract):
    return _product(dtype, precision, a, b, contract), (a, b)


def _one_type_backward(dtype, precision, contract, saved, d_out):
    a, b = saved
    product = partial(_product, dtype, precision)
    free_a, free_b = 1 - contract[0], 1 - contract[1]
    d_a = product(d_out, b, (1, free_b)) if free_a == 0 else product(b, d_out, (free_b, 1))
    d_b = product(a, d_out, (free_a, 0)) if free_b == 1 else product(d_out, a, (0, free_a))
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


product_of_one_type.defvjp(_one_type_forward, _one_type_backward)


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
    """Decays e^d `[C, C]` (zero above the diagonal), b and z `[C, 1]`, b_C in a column `[K, 1]`.

    (Not `[1, 1]`: its derivative is a sum over two axes, which Triton's lowering lacks.)
    """
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


def scores_in_a_loop(product, q, k, g):
    """`scores_by_halving`, one scale after the other: fewer arrays are in registers at once."""

    def add(level, scores):
        return scores + _of_level(product, level, q, k, g)

    return lax.fori_loop(0, q.shape[0].bit_length() - 1, add, _same_step(q, k))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scores_with_derivative(product, q, k, g):
    """`scores_in_a_loop` whose derivative is a loop, too; of `product_of_one_type`."""
    return scores_in_a_loop(product, q, k, g)


def _scores_forward(product, q, k, g):
    plain = partial(_product, *product.args)
    return scores_in_a_loop(plain, q, k, g), (q, k, g)


def _scores_backward(product, saved, d_out):
    q, k, g = saved
    _, pull = jax.vjp(_same_step, q, k)

    def add(level, sums):
        _, pull = jax.vjp(partial(_of_level, product, level), q, k, g)
        return tuple(a + b for a, b in zip(sums, pull(d_out), strict=True))

    start = (*pull(d_out), jnp.zeros_like(g))
    return lax.fori_loop(0, q.shape[0].bit_length() - 1, add, start)


scores_with_derivative.defvjp(_scores_forward, _scores_backward)


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
