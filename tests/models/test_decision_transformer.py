import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.control import decision_transformer


def episode(batch=2, steps=6, states=4, actions=2, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal((batch, steps, *shape)).astype("f")  # noqa: E731
    times = np.tile(np.arange(steps, dtype=np.int32), (batch, 1)) + 3
    return normal(states), normal(actions), normal(1), times


@pytest.fixture(scope="module")
def small():
    """A small policy with unit-scale weights, and its compiled call."""
    model = zoo.create("decision_transformer_test")
    return model, filled(model), jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(decision_transformer.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


@pytest.mark.parametrize("what, first", [("states", 3), ("actions", 4), ("returns", 3)])
def test_a_change_reaches_only_the_actions_behind_it(small, what, first):
    _, variables, call = small
    inputs = dict(zip(("states", "actions", "returns", "times"), episode(), strict=True))
    before = call(variables, **inputs)
    inputs[what] = inputs[what].copy()
    inputs[what][:, 3] += 1
    after = call(variables, **inputs)
    np.testing.assert_array_equal(before[:, :first], after[:, :first])
    assert np.abs(before[:, first:] - after[:, first:]).max((0, 2)).min() > 0


def test_padding_at_the_left_changes_nothing(small):
    _, variables, call = small
    inputs = episode()
    pad = lambda t: np.pad(t, [(0, 0), (4, 0), *[(0, 0)] * (t.ndim - 2)])  # noqa: E731
    mask = np.tile(np.arange(10) >= 4, (2, 1)).astype("f")
    padded = call(variables, *map(pad, inputs), mask)
    assert np.isfinite(padded).all()
    assert_trees_close(padded[:, 4:], call(variables, *inputs), 1e-5)


def test_without_padding_a_mask_of_ones_is_no_mask(small):
    _, variables, call = small
    inputs = episode()
    assert_trees_close(
        call(variables, *inputs, np.ones((2, 6), "f")), call(variables, *inputs), 1e-5
    )


def test_actions_are_bounded_where_asked():
    model = zoo.create("decision_transformer_test", action_tanh=False)
    variables = filled(model)
    free = jax.jit(model.apply)(variables, *episode())
    bounded = jax.jit(model.clone(action_tanh=True).apply)(variables, *episode())
    assert_trees_close(bounded, np.tanh(free), 1e-5)


ATARI = dict(embed_dim=16, depth=1, num_heads=2, max_steps=20, context=4)


def frames(batch=2, steps=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "states": rng.random((batch, steps, 84, 84, 4)).astype("f"),
        "times": np.array([0, 7], np.int32),
        "actions": rng.integers(0, 4, (batch, steps)).astype(np.int32),
        "returns": rng.standard_normal((batch, steps, 1)).astype("f"),
    }


def test_an_episode_is_played_step_by_step_as_it_is_read_at_once():
    """Actions up to the last but one, and none at the first step, give the same logits."""
    model = zoo.create("decision_transformer_breakout", **ATARI)
    variables, whole = filled(model), frames()
    call = jax.jit(model.apply)
    want = call(variables, **whole)
    for steps in (1, 3):
        part = {k: v if k == "times" else v[:, :steps] for k, v in whole.items()}
        part["actions"] = part["actions"][:, :-1] if steps > 1 else None
        assert_trees_close(call(variables, **part), want[:, :steps], 1e-5)


def test_cloning_needs_no_returns():
    model = zoo.create("decision_transformer_breakout", **ATARI, conditioned=False)
    inputs = {k: v for k, v in frames().items() if k != "returns"}
    variables = filled(model)
    assert jax.eval_shape(model.apply, variables, **inputs).shape == (2, 3, 4)
    assert "embed_return" in variables["params"]  # as in published files, which never use it
    with pytest.raises(ValueError, match="conditioned=False wants no returns"):
        jax.eval_shape(model.apply, variables, **frames())


def test_a_sequence_has_a_place_for_each_token():
    model = zoo.create("decision_transformer_breakout", **ATARI)
    with pytest.raises(ValueError, match="There are 13 places, too few for 15 tokens"):
        jax.eval_shape(model.init, jax.random.key(0), **frames(steps=5))
    with pytest.raises(ValueError, match="give one for each of 3 steps"):
        wrong = frames() | {"actions": jnp.zeros((2, 1), int)}
        jax.eval_shape(model.init, jax.random.key(0), **wrong)


def test_what_is_not_its_own_is_one_sentence():
    model = zoo.create("decision_transformer_test")
    with pytest.raises(ValueError, match="takes states of 4, actions of 2"):
        jax.eval_shape(model.init, jax.random.key(0), *episode(states=5))
