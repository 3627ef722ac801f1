import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.causal import Context
from zoo.models.language import liger
from zoo.models.language.liger import KINDS, linearize


def tokens(batch=2, length=20, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


@pytest.fixture(scope="module")
def base():
    """The small LLaMA with unit-scale weights."""
    model = zoo.create("llama_test")
    return model, filled(model)


@pytest.fixture(scope="module", params=KINDS)
def small(request, base):
    """A linearised LLaMA with the LLaMA's own variables, and its compiled call."""
    model = linearize(base[0], request.param, window=6, slots=4)
    return model, base[1], jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(liger.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


def test_there_is_no_new_parameter(small, base):
    model, variables, call = small
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(1, 4)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    assert_trees_close(zoo.convert(model, zoo.export(*base)), variables, 0)
    assert np.abs(call(variables, tokens()) - base[0].apply(variables, tokens())).max() > 0.1


def test_a_wide_window_alone_is_llama(small, base):
    model, variables, _ = small
    whole = model.clone(share=0.0, window=20)
    assert_trees_close(
        jax.jit(whole.apply)(variables, tokens()), base[0].apply(variables, tokens()), 1e-5
    )
    kept = model.clone(attention_layers=(0, 1))
    assert_trees_close(
        jax.jit(kept.apply)(variables, tokens()), base[0].apply(variables, tokens()), 1e-5
    )


def test_steps_of_padded_texts_equal_each_alone(small):
    model, variables, call = small
    x, mask = tokens(), np.arange(20) >= np.array([[0], [7]])
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, first = step(variables, model.init_state(2, 20), x[:, :18], mask[:, :18])
    state, second = step(variables, state, x[:, 18:19])
    _, third = step(variables, state, x[:, 19:])
    got = jnp.concatenate([first, second, third], axis=1)
    assert_trees_close(got[:1], call(variables, x[:1]), 2e-5)
    assert_trees_close(got[1:, 7:], call(variables, x[1:, 7:]), 2e-5)
    shapes = lambda n: jax.tree.map(jnp.shape, model.init_state(1, n))  # noqa: E731
    assert shapes(50) == shapes(5000)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrences_are_the_papers(kind):
    """Token by token in NumPy."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, 2, 8)).astype("f") for _ in range(3))
    got, _ = KINDS[kind](*map(jnp.asarray, (q, k, v)), 4, None, Context())
    log_sigmoid = lambda t: -np.log1p(np.exp(-t))  # noqa: E731

    def softmax(t):
        e = np.exp(t - t.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    want = np.zeros((9, 2, 8))
    for h in range(2):
        keys, values = np.zeros((4, 8)), np.zeros((4, 8))
        memory = np.zeros((8, 8))
        for t in range(9):
            key, value, query = (x[0, t, h].astype(float) for x in (k, v, q))
            if kind == "gsa":
                gate = np.exp(log_sigmoid(key.reshape(4, 2).mean(-1)) / 16)[:, None]
                keys = gate * keys + (1 - gate) * key
                values = gate * values + (1 - gate) * value
                want[t, h] = values.T @ softmax(keys @ query)
                continue
            gate = np.exp(log_sigmoid(key) / (16 if kind == "gla" else 1))
            write = softmax(key) if kind == "gla" else 1 - gate
            memory = gate[:, None] * memory + np.outer(write, value)
            want[t, h] = memory.T @ softmax(query)
    assert_trees_close(got[0], want, 1e-5)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"kind": "rwkv"}, "kind='rwkv' is none of 'gla', 'hgrn2', 'gsa'"),
        ({"kind": "gsa", "slots": 3}, "slots=3 does not divide 8 channels"),
    ],
)
def test_what_does_not_fit_is_one_sentence(base, fields, sentence):
    model = linearize(base[0], **{"slots": 4} | fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(1, 4)))
