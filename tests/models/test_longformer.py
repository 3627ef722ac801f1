import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    learn,
)

import zoo
from zoo.layers.attention import attention_weights
from zoo.models.language import longformer
from zoo.models.language.longformer import LongformerAttention, window_mask


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(3, 97, size=(batch, length)).astype(np.int32)


def layer(mask, **fields):
    """One attention layer of unit-scale weights, and normal inputs of 37 tokens."""
    module = LongformerAttention(4, mask, **fields)
    x = jax.random.normal(jax.random.key(0), (2, 37, 32))
    visible = jnp.ones((2, 37), bool).at[1, 30:].set(False)
    variables = jax.jit(module.init)(jax.random.key(1), x, visible, None)
    return module, jax.tree.map(lambda p: p * 8, variables), x, visible


def by_hand(variables, x, visible, is_global, mask):
    """The definition, dense: one softmax a row, the rows of global tokens replaced."""
    p = variables["params"]

    def project(name):
        y = x @ p[name]["kernel"] + p[name]["bias"]
        return y.reshape(*x.shape[:2], 4, 8)

    i = jnp.arange(x.shape[1])
    seen = (mask(i[:, None], i) | is_global[:, None, :]) & visible[:, None, :]
    bias = jnp.where(seen, 0.0, -1e30)[:, None]
    weights = attention_weights(project("query"), project("key"), bias=bias)
    y = jnp.einsum("bnqk,bknd->bqnd", weights, project("value"))
    weights = attention_weights(project("query_global"), project("key_global"), visible=visible)
    every = jnp.einsum("bnqk,bknd->bqnd", weights, project("value_global"))
    y = jnp.where(is_global[:, :, None, None], every, y)
    y = jnp.where(visible[:, :, None, None], y, 0)
    return y.reshape(x.shape) @ p["out"]["kernel"] + p["out"]["bias"]


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(longformer.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize(
    "mask",
    [window_mask(8), window_mask(6, dilation=3), window_mask(8, causal=True)],
    ids=["window", "dilated", "causal"],
)
def test_the_parts_make_one_softmax(mask):
    """Of 37 tokens, no multiple of the window; global tokens differ in number by example."""
    module, variables, x, visible = layer(mask)
    is_global = jnp.zeros((2, 37), bool).at[0, jnp.array([0, 5, 36])].set(True).at[1, 2].set(True)
    got = jax.jit(module.apply)(variables, x, visible, is_global)
    assert_trees_close(got, by_hand(variables, x, visible, is_global, mask), 1e-5)
    none = jnp.zeros_like(is_global)
    got = jax.jit(module.apply)(variables, x, visible, None)
    assert_trees_close(got, by_hand(variables, x, visible, none, mask), 1e-5)


def test_room_for_global_tokens_changes_nothing_but_what_does_not_fit():
    module, variables, x, visible = layer(window_mask(8), max_global=3)
    is_global = jnp.zeros((2, 37), bool).at[0, jnp.array([0, 5, 9, 20])].set(True)
    is_global = is_global.at[1, jnp.array([1, 7])].set(True)
    got = jax.jit(module.apply)(variables, x, visible, is_global)
    want = by_hand(variables, x, visible, is_global, window_mask(8))
    assert_trees_close(got[1], want[1], 1e-5)
    assert np.isnan(got[0]).all()  # four do not fit into three places


def test_a_token_depends_on_its_window_and_on_global_tokens_alone():
    module, variables, x, visible = layer(window_mask(8))
    is_global = jnp.zeros((2, 37), bool).at[:, 1].set(True)
    rows = jax.jit(jax.jacobian(lambda x: module.apply(variables, x, visible, is_global)[0, 20]))(x)
    reached = np.abs(rows[:, 0]).max((0, 2)) > 0
    assert set(np.flatnonzero(reached)) == {1, *range(16, 25)}
    row = jax.jit(jax.jacobian(lambda x: module.apply(variables, x, visible, is_global)[0, 1]))(x)
    assert (np.abs(row[:, 0]).max((0, 2)) > 0).all()


def test_a_window_wider_than_the_text_is_full_attention():
    model = zoo.create("longformer_test", window=200)
    variables, x = filled(model), tokens()
    assert_trees_close(
        jax.jit(model.apply)(variables, x),
        jax.jit(model.clone(window=(80, 500)).apply)(variables, x),
        1e-6,
    )
    narrow = jax.jit(model.clone(window=8).apply)(variables, x)
    assert np.abs(narrow - jax.jit(model.apply)(variables, x)).max() > 0.01


def test_padding_changes_nothing():
    model = zoo.create("longformer_test")
    variables, x = filled(model), tokens(length=29)
    glob = np.zeros_like(x)
    glob[:, 3] = 1
    padded = np.pad(x, ((0, 0), (0, 12)), constant_values=1)
    call = jax.jit(model.apply)
    got = call(variables, padded, padded != 1, np.pad(glob, ((0, 0), (0, 12))))
    assert_trees_close(got[:, :29], call(variables, x, None, glob), 1e-5)


def test_time_and_memory_grow_with_the_length_and_not_with_its_square():
    """Counted by the compiler: four times the length costs about four times as much."""
    model = zoo.create("longformer_test", window=64, max_positions=20000, max_global=8)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 8))

    def flops(length):
        x = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(model.apply).lower(variables, x, x, x).compile().cost_analysis()["flops"]

    assert flops(8192) < 4.6 * flops(2048)


def test_heads_make_the_tokens_global_that_the_authors_do():
    x = tokens()
    x[0, 7], x[1, 12] = 2, 2  # where the question ends
    for head, want in (
        ("classification", np.arange(40) < np.array([[1], [1]])),
        ("question_answering", np.arange(40) < np.array([[7], [12]])),
    ):
        model = zoo.create("longformer_test", depth=1, head=head)
        variables = filled(model)
        call = jax.jit(model.apply)
        assert_trees_close(call(variables, x), call(variables, x, None, want), 0)
        assert np.abs(call(variables, x) - call(variables, x, None, 0 * x)).max() > 1e-3


@pytest.mark.slow
def test_a_far_token_is_told_by_a_global_token_alone():
    """Which of two words stands at place 200, with windows of 16; the class is read at place 0."""
    model = zoo.create(
        "longformer_test", head="classification", num_classes=2, vocab_size=22, depth=1,
        num_heads=2, window=16, max_positions=210, max_global=1,
    )  # fmt: skip

    def accuracy(has_global):
        def draw(key):
            keys = jax.random.split(key)
            label = jax.random.randint(keys[1], (16,), 0, 2)
            x = jax.random.randint(keys[0], (16, 208), 4, 20)
            global_mask = jnp.zeros_like(x).at[:, 0].set(has_global)
            return x.at[:, 200].set(20 + label), global_mask, label

        def said(variables, x, global_mask):
            return model.apply(variables, x, global_mask=global_mask)

        def loss(variables, batch):
            *inputs, label = batch
            every = optax.softmax_cross_entropy_with_integer_labels(said(variables, *inputs), label)
            return every.mean()

        variables = jax.jit(model.init)(jax.random.key(0), draw(jax.random.key(0))[0])
        variables, _ = learn(loss, variables, draw, steps=200)
        tests, call = map(draw, jax.random.split(jax.random.key(2), 16)), jax.jit(said)
        return np.mean([(call(variables, *t[:2]).argmax(-1) == t[2]).mean() for t in tests])

    assert accuracy(1) > 0.95
    assert accuracy(0) < 0.65  # of 256 guesses


@pytest.mark.parametrize(
    "fields, arguments, sentence",
    [
        ({"window": 7}, (), "should be even: half of it lies on each side"),
        ({"window": (8, 8, 8)}, (), "one positive number for each of 2 layers"),
        ({"causal": True}, (None, tokens()), "causal=True has no global tokens"),
        ({"head": "x"}, (), "head='x' is none of None, 'masked_lm'"),
        ({"num_heads": 5}, (), "num_heads=5 does not divide 32 channels"),
        ({"max_positions": 30}, (), "reads at most 28 tokens, not 40"),
        ({}, (tokens(2, 7),), "mask has shape"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, arguments, sentence):
    model = zoo.create("longformer_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(), *arguments))
