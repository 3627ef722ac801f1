"""First values, made one operation after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.training import first
from zoo.training.first import BLOCKS, one_by_one


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


def drawn(seed):
    """Draws of several kinds and sizes: less than the smallest block, and one more than it."""
    keys = jax.random.split(jax.random.wrap_key_data(seed), 5)
    return {
        "normal": jax.random.normal(keys[0], (3, 7)),
        "again": 2 * jax.random.normal(keys[1], (3, 7)),
        "uniform": jax.random.uniform(keys[2], (BLOCKS[-1] + 1,), minval=-1, maxval=2),
        "truncated": jax.random.truncated_normal(keys[3], -2, 2, (4, 5)),
        "half": jax.random.normal(keys[4], (6,), jnp.bfloat16),
        "folded": jax.jit(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (4,)))(keys[4]),
    }


def test_draws_made_of_blocks_are_those_of_the_generator(monkeypatch):
    seed, made = jax.random.key_data(jax.random.key(4)), []
    block = first._block
    monkeypatch.setattr(first, "_block", lambda *args: made.append(args[1]) or block(*args))
    wanted, got = jax.jit(drawn)(seed), one_by_one(drawn)(seed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
    # traced once for each call, and compiled once for each of four kinds; halves go the other way
    assert made == [BLOCKS[-1]] * len(made)
    assert len(made) == 5 + 4


@pytest.mark.parametrize("size", [2, BLOCKS[-1], BLOCKS[-1] + 3])
def test_numbers_of_blocks_are_those_of_the_generator(size):
    seed = jax.random.key_data(jax.random.key(8))

    def draw(seed):
        return jax.random.uniform(jax.random.wrap_key_data(seed), (size,))

    np.testing.assert_array_equal(one_by_one(draw)(seed), draw(seed))
