import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.control import gtrxl


def observations(batch=2, length=8, dims=5, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, length, dims)).astype("f")


def memory_of(model, batch=2, seed=1):
    return np.random.default_rng(seed).standard_normal(model.init_state(batch).shape).astype("f")


@pytest.fixture(scope="module")
def small():
    """A small network with unit-scale weights, and its compiled step."""
    model = zoo.create("gtrxl_test")
    step = jax.jit(lambda v, state, x, reset=None: model.apply(v, state, x, reset, method="step"))
    return model, filled(model), step


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(gtrxl.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


def test_the_memory_is_what_the_layers_were_given_last(small):
    model, variables, step = small
    x, memory = observations(length=4), memory_of(model)
    after, _ = step(variables, memory, x)
    run = jax.jit(lambda v, x: model.apply(v, x, method="features"))
    np.testing.assert_array_equal(after[:, :, :2], memory[:, :, 4:])
    embed = run(variables, x)["embed"]  # the first level does not depend on the memory
    np.testing.assert_array_equal(after[:, 0, 2:], embed)
    longer, _ = step(variables, memory, observations(length=9))
    assert longer.shape == memory.shape


def test_tokens_see_what_is_not_after_them_and_the_memory(small):
    model, variables, step = small
    x, memory = observations(), memory_of(model)
    _, before = step(variables, memory, x)
    changed = x.copy()
    changed[:, 5] += 1
    _, after = step(variables, memory, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max(-1).min() > 0
    other = memory.copy()
    other[:, 0, -1] += 1
    assert np.abs(step(variables, other, x)[1] - before).max(-1).min() > 0


def test_segments_equal_the_whole_where_the_memory_holds_it():
    """With one layer: deeper ones see further back in the second segment."""
    model = zoo.create("gtrxl_test", depth=1, memory_length=8)
    variables, x = filled(model), observations(length=6)
    step = jax.jit(lambda v, state, x: model.apply(v, state, x, method="step"))
    state = memory_of(model)
    _, whole = step(variables, state, x)
    state, first = step(variables, state, x[:, :4])
    # the oldest four have left the memory: hide them from the whole, too
    assert_trees_close(first, whole[:, :4], 1e-5)
    np.testing.assert_array_equal(state[:, :, :4], memory_of(model)[:, :, 4:])


def test_a_reset_row_begins_anew(small):
    model, variables, step = small
    x, memory = observations(), memory_of(model)
    _, got = step(variables, memory, x, np.array([True, False]))
    _, kept = step(variables, memory, x)
    _, fresh = step(variables, model.init_state(2), x)
    np.testing.assert_array_equal(got[0], fresh[0])
    np.testing.assert_array_equal(got[1], kept[1])
    assert np.abs(fresh[1] - kept[1]).max() > 0


def test_no_gradient_goes_into_the_memory(small):
    model, variables, _ = small
    x = observations()

    def loss(memory):
        state, y = model.apply(variables, memory, x, method="step")
        return jnp.sin(y).sum() + jnp.sin(state).sum()

    assert not np.any(jax.jit(jax.grad(loss))(memory_of(model)))


def test_scores_are_the_definition():
    """Against loops over queries and keys: content, distance, both biases."""
    rng = np.random.default_rng(0)
    module = gtrxl.RelativeAttention(2, 4)
    x, memory = rng.standard_normal((1, 3, 8)), rng.standard_normal((1, 2, 8))
    full, table = np.concatenate([memory, x], 1), np.asarray(gtrxl.distances(5, 8))
    biases = tuple(rng.standard_normal((2, 4)) for _ in range(2))
    variables = jax.jit(module.init)(jax.random.key(0), x, full, table, biases)
    p = jax.tree.map(np.asarray, variables["params"])
    by_head = lambda name, t: (t @ p[name]["kernel"] + p[name]["bias"]).reshape(-1, 2, 4)  # noqa: E731
    q, k, v = by_head("query", x[0]), by_head("key", full[0]), by_head("value", full[0])
    r = by_head("relative", table)[::-1]  # by distance
    y = np.zeros((3, 2, 4))
    for i in range(3):
        for n in range(2):
            seen = range(2 + i + 1)
            scores = np.array([
                (q[i, n] + biases[0][n]) @ k[j, n] + (q[i, n] + biases[1][n]) @ r[2 + i - j, n]
                for j in seen
            ])  # fmt: skip
            weights = np.exp(scores / 2 - (scores / 2).max())
            y[i, n] = weights / weights.sum() @ v[: 3 + i, n]
    want = y.reshape(3, 8) @ p["out"]["kernel"] + p["out"]["bias"]
    got = jax.jit(module.apply)(variables, x, full, table, biases)
    assert_trees_close(got[0], want, 1e-5)


def test_a_gate_begins_near_the_identity():
    gate = gtrxl.Gate(2.0)
    x, y = observations(2, 3, 16, 0), observations(2, 3, 16, 1)
    variables = jax.tree.map(lambda w: 0.01 * w, jax.jit(gate.init)(jax.random.key(0), x, y))
    variables["params"]["bias"] = np.full(16, 2.0, "f")
    np.testing.assert_allclose(gate.apply(variables, x, y), (1 - 1 / (1 + np.e**2)) * x, atol=0.05)


@pytest.mark.parametrize(
    "fields, shape, sentence",
    [
        ({}, (1, 4, 6), r"takes observations of shape \(batch, length, 5\)"),
        ({"embed_dim": 33}, (1, 4, 5), "embed_dim=33 must be even"),
        ({"embedded": False}, (1, 4, 5), "equal to observation_dim=5"),
        ({"activation": "softplus2"}, (1, 4, 5), "activation='softplus2' is none of"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, shape, sentence):
    model = zoo.create("gtrxl_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_a_memory_of_another_network_is_refused(small):
    model, variables, _ = small
    with pytest.raises(ValueError, match="Begin with init_state"):
        model.apply(variables, model.init_state(3), observations(), method="step")


def test_the_older_order_ends_every_layer_in_a_norm():
    """Transformer-XL: each LayerNorm stands behind a sum, and the layers' outputs are its own."""
    model = zoo.create("gtrxl_test", gated=False, reordered=False)
    x = observations(length=4)
    out = jax.jit(lambda key: model.init_with_output(key, x, method="features")[0])(
        jax.random.key(0)
    )
    for name in ("layer0", "layer1"):
        np.testing.assert_allclose(out[name].mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(out[name].std(-1), 1, atol=1e-2)
    assert np.abs(out["embed"].std(-1) - 1).min() > 0.1
