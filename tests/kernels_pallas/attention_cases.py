"""Problems, operands and the comparison with the definition, for the tests of every body."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    And,
    Causal,
    Chunked,
    ClippedSoftmax,
    Dilated,
    Neighborhood,
    Or,
    PrefixLM,
    Sigmoid,
    SlidingWindow,
    Softmax,
)
from kernels_pallas.attention import reference
from kernels_pallas.attention.problem import Operands, Problem

SCORES = [Softmax(), Softmax(cap=2.0), Sigmoid(bias=-2.0), ClippedSoftmax(gamma=-0.1, zeta=1.05)]


def pairs(first, second, default):
    """Parameters of two lists; those pairs that are not `default` are marked slow."""
    return [
        pytest.param(a, b, id=f"{a}-{b}", marks=[] if (a, b) in default else [pytest.mark.slow])
        for a in first
        for b in second
    ]


def every_third_ancestor(q, k):
    return (k <= q) & ((q - k) % 3 == 0)


def gaussian_multiplier(s, q, k):
    return s * jnp.exp(-0.01 * (q - k).astype(jnp.float32) ** 2)


CASES = {
    "plain": dict(),
    "causal": dict(mask=Causal()),
    "cache": dict(mask=Causal(offset=16), queries=21),
    "sliding": dict(mask=SlidingWindow(left=5, right=2)),
    "chunked": dict(mask=And(Chunked(8), Causal())),
    "prefix": dict(mask=PrefixLM(10)),
    "dilated": dict(mask=Dilated(left=3, right=1, step=2)),
    "neighborhood": dict(mask=Neighborhood((5, 7), 3), queries=35, keys=35),
    "or": dict(mask=Or(SlidingWindow(2, 2), Dilated(5, 0, 4))),
    "function": dict(mask=every_third_ancestor),
    "score_function": dict(score=Softmax(modify=gaussian_multiplier)),
    "bias": dict(bias=(1, 4)),
    "bias_of_examples": dict(bias=(2, 1)),
    "bias_of_everything": dict(bias=(2, 4)),
    "boolean_bias": dict(bias=(2, 1), boolean=True),
    "segments": dict(segments=True),
    "slopes": dict(slopes=True, mask=Causal()),
    "dropout": dict(dropout=0.3, bias=(1, 4)),
    "cross": dict(queries=5, keys=61),
    "one_query": dict(queries=1),
    "one_key": dict(keys=1),
    "all": dict(mask=Causal(), bias=(1, 4), segments=True, slopes=True, dropout=0.2),
}


def operands(seed=0, *, queries=37, keys=37, heads=4, kv_heads=2, head_dim=8, value_dim=12,
             bias=None, boolean=False, segments=False, slopes=False, dropout=0.0, mask=None,
             score=None, dtype=jnp.float32):  # fmt: skip
    """A `Problem` and its operands, heads first; the score is Softmax unless given."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    if bias is not None:
        bias = normal(*bias, queries, keys)
        bias = bias > 0 if boolean else bias
    cut = jnp.asarray([[0] * 11 + [1] * 9 + [2] * 41, [0] * 30 + [-1] * 31])
    x = Operands(
        normal(2, heads, queries, head_dim),
        normal(2, kv_heads, keys, head_dim),
        normal(2, kv_heads, keys, value_dim),
        bias=bias,
        slopes=jnp.asarray(2.0 ** -np.arange(1, heads + 1), dtype) if slopes else None,
        query_segments=cut[:, :queries] if segments else None,
        key_segments=jnp.where(cut == -1, -2, cut)[:, :keys] if segments else None,
        seeds=jnp.asarray(rng.integers(0, 2**32, (2, heads)), jnp.uint32) if dropout else None,
    )
    problem = Problem(mask, score or Softmax(), head_dim**-0.5, dropout, "highest")
    return problem, x


def floats(x):
    """The operands that have gradients, by name."""
    return {
        name: value
        for name, value in x._asdict().items()
        if value is not None and jnp.issubdtype(value.dtype, jnp.floating)
    }


def oracle(problem, x, d_out, d_lse):
    """Output, log-sum-exp and gradients by the definition."""

    def call(arrays):
        return reference.attention(problem, x._replace(**arrays))

    results, pullback = jax.vjp(call, floats(x))
    return results, pullback((d_out, d_lse))[0]


def cotangents(problem, x, seed=1):
    """Random gradients of the output and of the log-sum-exp (zero where a score has none)."""
    rng = np.random.default_rng(seed)
    shape = (*x.query.shape[:3], x.value.shape[-1])
    d_lse = rng.normal(size=shape[:3]) if problem.score.normalised else np.zeros(shape[:3])
    return jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(d_lse, jnp.float32)


def assert_near(got, want, tolerance, name=""):
    """Within `tolerance` of the largest expected value."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape, name
    error, scale = np.abs(got - want).max(), max(np.abs(want).max(), 1e-3)
    assert error <= tolerance * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"


def assert_equals_oracle(body, problem, x, tolerance=3e-6):
    """A body's two passes against the definition and its derivative."""

    @jax.jit
    def both(x, d_out, d_lse):
        out, lse = body.forward(problem, x)
        got = body.backward(problem, x, out, lse, d_out.astype(out.dtype), d_lse)
        return (out, lse), got, *oracle(problem, x, d_out, d_lse)

    (out, lse), got, (want_out, want_lse), want = both(x, *cotangents(problem, x))
    assert_near(out, want_out, tolerance, "out")
    if problem.score.normalised:
        assert_near(lse, want_lse, tolerance, "lse")
    for name, gradient in want.items():
        assert_near(getattr(got, name), gradient, 2 * tolerance, name)
    return out, lse, got
