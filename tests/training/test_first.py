"""First values, made one operation after the other."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.training.first import one_by_one


def values(seed):
    """A seed, a draw of it, a constant twice."""
    zeros = jnp.zeros(3)
    draw = 0.02 * jax.random.normal(jax.random.wrap_key_data(seed), (2, 5))
    return {"seed": seed, "zeros": zeros, "again": zeros, "draw": draw}


def test_values_are_those_of_the_compiled_function_and_may_be_used_up():
    seed = jax.random.key_data(jax.random.key(3))
    wanted, got = jax.jit(values)(seed), one_by_one(values)(seed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(got)
    np.testing.assert_array_equal(one_by_one(values)(seed)["zeros"], np.zeros(3))
    np.testing.assert_array_equal(seed, wanted["seed"])
