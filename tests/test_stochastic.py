"""Stochastic depth: which examples are dropped, and that draws know nothing of each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError

from zoo.layers.stochastic import DropPath, drop_path, mixed, uniform_rows

KEY = jax.random.key(5)


class Paths(nn.Module):
    """Two paths, the second twice."""

    @nn.compact
    def __call__(self, x):
        """What is kept of ones."""
        twice = DropPath(0.5)
        return jnp.stack([DropPath(0.5)(x, True), twice(x, True), twice(x, True)])


def test_an_example_is_dropped_or_scaled_as_a_whole():
    x = jnp.ones((4, 2, 3))
    y = drop_path(x, 0.25, jnp.array([0.1, 0.25, 0.3, 0.0]))
    np.testing.assert_allclose(y, np.array([0, 4 / 3, 4 / 3, 0])[:, None, None] * x, rtol=1e-6)


def test_paths_calls_and_keys_drop_other_rows_and_the_same_ones_again():
    def kept(key):
        return np.asarray(Paths().apply({}, jnp.ones((256, 1)), rngs={"dropout": key}))[..., 0] > 0

    found = np.concatenate([kept(KEY), kept(jax.random.key(6))])
    np.testing.assert_array_equal(found[:3], kept(KEY))
    agree = (found[:, None] == found[None]).mean(-1)[np.triu_indices(6, 1)]
    np.testing.assert_allclose(agree, 0.5, atol=0.17)  # 5.4 standard deviations


def test_a_missing_stream_is_said_as_flax_says_it():
    with pytest.raises(InvalidRngError, match="dropout"):
        Paths().apply({}, jnp.ones((2, 1)))


def test_rows_are_the_same_however_many_there_are():
    np.testing.assert_array_equal(uniform_rows(KEY, "a", 9)[:4], uniform_rows(KEY, "a", 4))


def test_draws_are_uniform_and_uncorrelated_over_rows_keys_and_names():
    keys = jax.random.split(KEY, 40)
    names = [f"layers_{i}/DropPath_{j}" for i in range(20) for j in (0, 1)]
    draws = np.stack([jax.vmap(lambda k, n=n: uniform_rows(k, n, 64))(keys) for n in names])
    counts, _ = np.histogram(draws, bins=64, range=(0, 1))
    expected = draws.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * np.sqrt(2 * 63)
    centred = draws - 0.5
    for axis in range(3):
        rows = np.moveaxis(centred, axis, 0).reshape(draws.shape[axis], -1)
        correlation = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
        assert np.abs(correlation).max() < 6 / np.sqrt(rows.shape[1])


def test_every_bit_depends_on_every_bit():
    x = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    flipped = jnp.stack([mixed(x) ^ mixed(x ^ np.uint32(1 << i)) for i in range(32)])
    changed = np.unpackbits(np.asarray(flipped).view(np.uint8)).reshape(32, 4096, 32).mean(1)
    np.testing.assert_allclose(changed, 0.5, atol=0.05)  # 6.4 standard deviations
