"""One number of all leaves: norms, and the first leaf that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.training import reductions
from zoo.training.reductions import SMALL, first_not_finite, norm

SHAPES = {"a": (), "b": (7,), "c": (3, SMALL), "d": (2, 3), "e": (SMALL // 8, 3, 5)}
"""Small leaves and large ones, by turns."""


@pytest.fixture
def leaves():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    shapes = zip(keys, SHAPES.values(), strict=True)
    return [jax.random.normal(key, shape) for key, shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_norm_is_that_of_all_numbers(leaves, dtype):
    leaves = [x.astype(dtype) for x in leaves]
    wanted = optax.tree.norm([x.astype(jnp.float32) for x in leaves])
    got = jax.jit(norm)({"there": leaves})
    np.testing.assert_allclose(got, wanted, rtol=1e-6 if dtype == jnp.float32 else 1e-2)
    assert norm({}) == 0


def test_the_first_leaf_that_is_not_finite_is_found(leaves):
    find = jax.jit(first_not_finite)
    assert find(leaves) == -1
    assert find([x * 1e30 for x in leaves]) == -1  # large, yet finite
    for index, leaf in enumerate(leaves):
        for value in (jnp.nan, jnp.inf, -jnp.inf):
            wrong = leaf.ravel().at[leaf.size - 1].set(value).reshape(leaf.shape)
            assert find([*leaves[:index], wrong, *leaves[index + 1 :]]) == index
    wrong = [x.at[...].set(jnp.nan) for x in leaves]
    assert find([*leaves[:2], *wrong[2:]]) == 2


def test_other_platforms_read_leaf_by_leaf(leaves):
    wrong = [*leaves[:3], leaves[3] * jnp.inf, leaves[4] * jnp.nan]
    assert reductions._first(*wrong) == first_not_finite(wrong) == 3
    assert reductions._first(*leaves) == -1
