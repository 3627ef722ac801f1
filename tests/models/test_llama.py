import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.layers import rotary
from zoo.layers.causal import positions_of
from zoo.models.language import llama


def tokens(batch=2, length=24, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


@pytest.fixture(scope="module")
def small():
    """The small LLaMA with unit-scale weights, and its compiled call."""
    model = zoo.create("llama_test")
    return model, filled(model), jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(llama.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


def test_scores_depend_on_distances_only(small):
    _, variables, call = small
    x = tokens()
    moved = call(variables, x, positions=jnp.arange(24)[None] + 1000)
    assert_trees_close(moved, call(variables, x), 2e-4)  # angles of 1,000 radians, in float32
    other = call(variables, x, positions=2 * jnp.arange(24)[None])
    assert np.abs(other - call(variables, x)).max() > 0.1


@pytest.mark.parametrize("window", [None, 7])
def test_steps_of_padded_texts_equal_each_alone(small, window):
    model, variables, _ = small
    model = model.clone(window=window)
    x, mask = tokens(), np.arange(24) >= np.array([[0], [9]])
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state = model.init_state(2, 25)
    state, first = step(variables, state, x, mask)
    _, after = step(variables, state, x[:, :1])
    whole = jax.jit(model.apply)(variables, x, mask, positions_of(mask))
    assert_trees_close(first[1, 9:], whole[1, 9:], 1e-5)
    alone = np.concatenate([x[1:, 9:], x[1:, :1]], axis=1)
    want = jax.jit(model.apply)(variables, alone)
    assert_trees_close(first[1:, 9:], want[:, :-1], 1e-5)
    assert_trees_close(after[1:], want[:, -1:], 1e-5)


def test_grouped_keys_equal_repeated_ones(small):
    model, variables, call = small
    width = 8

    def repeat(path, leaf):
        if {"key", "value"} & {p.key for p in path}:
            heads = leaf.reshape(leaf.shape[0], -1, width)
            return jnp.repeat(heads, 2, axis=1).reshape(leaf.shape[0], -1)
        return leaf

    wide = jax.tree_util.tree_map_with_path(repeat, variables)
    full = model.clone(num_kv_heads=4)
    assert_trees_close(jax.jit(full.apply)(wide, tokens()), call(variables, tokens()), 1e-5)


def test_llama3_slows_slow_channels_only():
    plain, _ = rotary.Rotary(500000.0).frequencies(64, jnp.zeros((1, 1), int))
    slowed, _ = rotary.Rotary(500000.0, rotary.Llama3(8.0)).frequencies(64, None)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(slowed[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(slowed[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert ((slowed < plain) & (slowed > plain / 8))[between].all() and between.any()


def test_dynamic_frequencies_are_plain_until_the_text_is_long():
    scaled = rotary.Rotary(10000.0, rotary.Dynamic(4.0, 32))
    at = lambda last: scaled.frequencies(16, jnp.full((1, 1), last))[0]  # noqa: E731
    plain, _ = rotary.Rotary().frequencies(16, None)
    np.testing.assert_allclose(at(31), plain, rtol=1e-6)
    assert (at(63)[1:] < plain[1:]).all()
    model = zoo.create("llama_test", rope_scaling=rotary.Dynamic(4.0, 32))
    model.init_state(1, 32)
    with pytest.raises(ValueError, match="turns all keys anew beyond 32 positions"):
        model.init_state(1, 33)


def test_meta_files_have_their_rows_in_pairs(small):
    model, variables, _ = small
    theirs = zoo.export(model, variables, "meta")
    ours = zoo.export(model, variables)
    name, other = "layers.1.attention.wk.weight", "model.layers.1.self_attn.k_proj.weight"
    first_head, halves = theirs[name][:8], ours[other][:8]
    np.testing.assert_array_equal(first_head[::2], halves[:4])
    np.testing.assert_array_equal(first_head[1::2], halves[4:])
    back = zoo.convert(model, theirs)
    assert_trees_close(back, variables, 0)
    again = zoo.export(model, back, "meta")
    assert all(np.array_equal(again[k], theirs[k]) for k in theirs)


def test_tied_files_load_with_and_without_the_second_copy(small):
    model = small[0].clone(tie_embeddings=True)
    variables = filled(model)
    state = zoo.export(model, variables)
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    assert_trees_close(zoo.convert(model, state), variables, 0)


@pytest.mark.slow
def test_a_text_is_learned_by_heart():
    """A thousand characters below 0.1 nats; which one comes next only attention can tell."""
    text = np.random.default_rng(0).integers(8, size=1025)
    windows = jnp.array(np.lib.stride_tricks.sliding_window_view(text, 33)[::16])
    model = zoo.create("llama_test", vocab_size=8, embed_dim=64, mlp_dim=128)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-2, 20, 300))

    def loss(variables):
        logits = model.apply(variables, windows[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return each[:, 8:].mean()  # the first of a window say too little of where it is

    @jax.jit
    def train(variables):
        def step(carry, _):
            variables, state = carry
            value, grads = jax.value_and_grad(loss)(variables)
            updates, state = optimizer.update(grads, state, variables)
            return (optax.apply_updates(variables, updates), state), value

        return jax.lax.scan(step, (variables, optimizer.init(variables)), length=300)[1]

    losses = train(jax.jit(model.init)(jax.random.key(0), windows[:1, :-1]))
    assert losses[0] > 2.0 and losses[-1] < 0.1, losses[-1]


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"num_heads": 5}, "num_heads=5 does not divide 32 channels"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"activation": "sillu"}, "activation='sillu' is none of"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    model = zoo.create("llama_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(1, 4)))


def test_longrope_has_other_factors_for_long_texts():
    scaling = rotary.LongRope((1.0, 2.0), (4.0, 8.0), original=4, factor=2.0)
    plain = np.array([1.0, 0.1], np.float32)
    for length, divisor in ((4, [1, 2]), (5, [4, 8])):
        frequencies, amplitude = scaling(plain, 10000.0, jnp.arange(length)[None])
        np.testing.assert_allclose(frequencies, plain / divisor, rtol=1e-6)
        assert amplitude == pytest.approx((1 + np.log(2) / np.log(4)) ** 0.5)
    with pytest.raises(ValueError, match="2 and 2 factors for 3 pairs"):
        scaling(np.ones(3, np.float32), 10000.0, jnp.arange(3)[None])
