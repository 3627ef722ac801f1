"""Objectives of foundation models at points whose value is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.tasks import imitation, objectives


def unit(key, *shape):
    x = jax.random.normal(jax.random.key(key), shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def test_equal_pairs_are_found_and_equal_scores_are_a_guess():
    x = jnp.eye(4)
    assert objectives.clip(x, x) < 1e-4
    np.testing.assert_allclose(objectives.clip(x, x, 0.0), np.log(4), rtol=1e-6)
    assert objectives.moco(x, x, -x) < objectives.moco(x, -x, x)
    assert objectives.simclr(x, x) < objectives.simclr(x, jnp.roll(x, 1, 0))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    tokens = jnp.arange(10).reshape(2, 5)
    logits = jnp.zeros((2, 5, 11))
    np.testing.assert_allclose(objectives.causal(logits, tokens), np.log(11), rtol=1e-6)
    chosen = jnp.zeros((2, 5), bool).at[0, 1].set(True)
    np.testing.assert_allclose(objectives.masked(logits, tokens, chosen), np.log(11), rtol=1e-6)


def test_a_mask_keeps_a_quarter_and_goes_back():
    removed, kept, back = objectives.random_mask(jax.random.uniform(jax.random.key(0), (3, 16)))
    assert (removed.sum(1) == 12).all() and kept.shape == (3, 4)
    for row in range(3):
        assert not removed[row, kept[row]].any()
        assert (back[row, kept[row]] == jnp.arange(4)).all()


def test_only_removed_patches_count():
    patches, output = (jax.random.normal(jax.random.key(k), (2, 8, 6)) for k in (0, 1))
    removed = jnp.arange(8) % 4 != 0
    removed = jnp.broadcast_to(removed, (2, 8))
    changed = jnp.where(removed[..., None], output, 99.0)
    before = objectives.mae(patches, output, removed)
    np.testing.assert_array_equal(objectives.mae(patches, changed, removed), before)


def test_preferences_cost_ln_2_without_a_margin():
    x = jnp.arange(3.0)
    np.testing.assert_allclose(objectives.reward(x, x), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(objectives.dpo(x, x, x, x), np.log(2), rtol=1e-6)
    assert objectives.reward(x + 1, x) < np.log(2) < objectives.reward(x, x + 1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_like_its_teacher_has_nothing_to_learn(temperature):
    logits = jax.random.normal(jax.random.key(0), (4, 7))
    loss = imitation.softened(logits, logits, temperature)
    assert np.abs(loss).max() < 1e-4
    value = jax.random.normal(jax.random.key(1), (2, 3, 5, 4))
    assert abs(imitation.value_relation(value, value)) < 1e-5
