"""The definition of attention: dense, float32, every step in the order of the equation.

    s = scale * q k^T -> score modifiers -> + bias -> mask
    w = softmax(s), clip((zeta - gamma) softmax(s) + gamma, 0, 1) or sigmoid(s + b)
    out = (dropout * w) v,    lse = log sum exp s

Rows without a visible key give zeros. Nothing dispatches here: it is what tests compare with.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.scores import MASKED, distance, dropout_factor, modified


def attention(problem: Problem, x: Operands):
    """Output `[batch, heads, queries, value_dim]` and log-sum-exp `[batch, heads, queries]`."""
    batch, heads, queries, _ = x.query.shape
    keys = x.key.shape[2]
    wide = jnp.promote_types(x.value.dtype, jnp.float32)
    q, k, v = (t.astype(wide) for t in (x.query, x.key, x.value))
    k, v = (jnp.repeat(t, heads // t.shape[1], axis=1) for t in (k, v))
    i, j = jnp.arange(queries)[:, None], jnp.arange(keys)[None, :]
    i = i + problem.offset
    if x.offsets is not None:
        i = i + x.offsets[:, None, None, None]
    problem = problem.bound(x.captured)

    s = problem.scale * jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest")
    s = modified(problem.score, s, i + problem.place, j)
    if x.slopes is not None:
        s = s - x.slopes[:, None, None] * distance(i + problem.place, j)
    visible = jnp.ones((batch, 1, queries, keys), bool) & (s > -jnp.inf)
    if problem.mask is not None:
        visible &= problem.mask(i, j)
    if x.query_segments is not None:
        visible &= (x.query_segments[:, :, None] == x.key_segments[:, None, :])[:, None]
    if x.bias is not None:
        bias = jnp.tile(x.bias, (batch // x.bias.shape[0], 1, 1, 1))
        if bias.dtype == bool:
            visible = visible & bias
        else:
            s = s + bias.astype(wide)
            visible = visible & (bias > MASKED)
    s = jnp.where(visible, s, MASKED)

    seen = visible.any(-1, keepdims=True)
    if problem.score.normalised:
        lse = jax.nn.logsumexp(s, axis=-1, keepdims=True)
        w = problem.score.weight(s, lse)
    else:
        lse = jnp.zeros_like(s[..., :1])
        w = problem.score.weight(s, None)
    w = jnp.where(visible, w, 0.0)
    if problem.dropout:
        row = jnp.arange(queries)[:, None]
        w = w * dropout_factor(problem.dropout, x.seeds[:, :, None, None], row, j, wide)
    out = jnp.einsum("bhqk,bhkd->bhqd", w, v, precision="highest")
    return out, jnp.where(seen, lse, MASKED)[..., 0]
