"""The approximate gradient of LoRA on attention: right, and linear in the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.methods.low_rank_gradient import approximate, exact


def problem(length, d=4, scale=0.3):
    keys = jax.random.split(jax.random.key(0), 5)
    x, y = (jax.random.uniform(k, (length, d), minval=-1) for k in keys[:2])
    names = ("query", "key", "value")
    weights = {
        n: scale * jax.random.normal(k, (d, d)) for n, k in zip(names, keys[2:], strict=True)
    }
    return x, y, weights


def test_the_formulas_are_the_gradient():
    x, y, weights = problem(12)

    def loss(weights):
        query, key, value = (x @ weights[name] for name in ("query", "key", "value"))
        return 0.5 * jnp.sum((jax.nn.softmax(0.5 * query @ key.T, -1) @ value - y) ** 2)

    wanted, got = jax.grad(loss)(weights), exact(x, y, weights, 0.5)
    for name, gradient in wanted.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(got[name], gradient, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("scale, converges", [(0.3, True), (6.0, False)])
def test_degree_helps_small_weights_and_not_large_ones(scale, converges):
    x, y, weights = problem(24, 3, scale)
    wanted = exact(x, y, weights, 0.5)
    errors = []
    for degree in (2, 4):
        got, positive = approximate(x, y, weights, 0.5, degree)
        assert positive
        errors.append(float(jnp.abs(got["output"] - wanted["output"]).max()))
    assert (errors[1] < 0.1 * errors[0]) == converges


def test_operations_grow_with_the_length():
    def operations(length):
        x, y, weights = problem(length)
        compiled = jax.jit(lambda x: approximate(x, y, weights, 0.5, 2)[0]).lower(x).compile()
        cost = compiled.cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    assert operations(2048) < 5 * operations(512)
