import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    Characters,
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
)

import zoo
from zoo.models.language import extractors
from zoo.models.language.extractors import INDICES, KINDS, Extractor, extract


def tokens(batch=2, length=24, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


def inputs(length=20, width=8):
    return jax.random.normal(jax.random.key(0), (2, length, width))


def weights(kind, width=8, slots=32):
    shape = {"she": (slots, width, width), "he": (slots, width)}.get(kind, (slots,))
    return jax.random.normal(jax.random.key(1), shape)


def by_hand(x, w, index):
    """The sum of the definition, term by term."""
    out = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for i in range(t + 1):
            slot = np.asarray(w[t - i if index == "relative" else i])
            out[:, t] += x[:, i] @ slot if slot.ndim == 2 else x[:, i] * slot
    return out


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(extractors.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kind", ["she", "he", "we"])
def test_convolutions_and_running_sums_are_the_sum(kind, index):
    x, w = np.asarray(inputs(), np.float64), weights(kind)
    assert_trees_close(extract(inputs(), w, index=index), by_hand(x, w, index), 1e-5)
    root = np.arange(1, 21)[:, None] ** 0.5
    got = extract(inputs(), w, index=index, scale=True)
    assert_trees_close(got, by_hand(x, w, index) / root, 1e-5)


@pytest.mark.parametrize("index", INDICES)
def test_each_kind_is_a_special_case_of_the_one_above(index):
    x, he, we = inputs(), weights("he"), weights("we")
    diagonal = jax.vmap(jnp.diag)(he)
    assert_trees_close(extract(x, diagonal, index=index), extract(x, he, index=index), 1e-5)
    spread = we[:, None] * jnp.ones(8)
    assert_trees_close(extract(x, spread, index=index), extract(x, we, index=index), 1e-5)
    me, adjusted = Extractor("me", 32, index), Extractor("we", 32, index)
    variables = me.init(jax.random.key(2), x)
    constant = x.at[..., 0].set(1)
    kernel = jnp.zeros((8, 8)).at[0].set(1)  # x W_adj = 1 where the first channel is 1
    params = {**variables["params"], "adjust": {"kernel": kernel}}
    assert_trees_close(
        adjusted.apply({"params": params}, constant), me.apply(variables, constant), 1e-5
    )


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_are_not_seen_and_steps_are_the_whole(kind, index):
    model = zoo.create("extractors_test", kind=kind, index=index)
    variables, x = filled(model), tokens()
    changed = np.where(np.arange(24) < 15, x, (x + 1) % 97)
    call = jax.jit(model.apply)
    whole, other = call(variables, x), call(variables, changed)
    assert np.abs(whole[:, :15] - other[:, :15]).max() < 1e-5 * np.abs(whole).max()
    step = jax.jit(lambda v, s, x: model.apply(v, s, x, method="step"))
    state, pieces = model.init_state(2, 24), []
    for t in range(24):
        state, logits = step(variables, state, x[:, t : t + 1])
        pieces.append(logits)
    assert_trees_close(jnp.concatenate(pieces, 1), whole, 1e-5)
    late = state | {"position": jnp.full(2, 64)}
    assert np.isnan(step(variables, late, x[:, :1])[1]).all()  # there are 64 slots


def test_relative_slots_commute_with_shifts_and_absolute_ones_do_not():
    x = inputs()
    late = jnp.pad(x, ((0, 0), (7, 0), (0, 0)))
    for kind in ("she", "he", "we"):
        for index, moves in (("relative", True), ("absolute", False)):
            a = extract(late, weights(kind), index=index)[:, 7:]
            b = extract(x, weights(kind), index=index)
            apart = np.abs(a - b).max() / np.abs(b).max()
            assert apart < 1e-5 if moves else apart > 0.1


def test_weights_are_as_many_as_the_paper_says():
    for kind, count in (
        ("she", 257 * 128**2),
        ("he", 128**2 + 256 * 128),
        ("we", 128**2 + 256),
        ("me", 256),
    ):
        shapes = jax.eval_shape(Extractor(kind).init, jax.random.key(0), jnp.zeros((1, 4, 128)))
        assert sum(p.size for p in jax.tree.leaves(shapes)) == count


@pytest.mark.slow
def test_text_is_learned_sooner_than_with_attention():
    """Characters, 16 at a time, in 400 steps: 2.0 nats with SHE, 2.3 with attention of that width.

    The frequencies of the characters alone give 3.25.
    """
    text = Characters(16)

    def loss(name, **fields):
        model = zoo.create(name, vocab_size=text.count, **fields)
        return text.held_out_loss(model, steps=400, rate=8e-3, batch=32)

    she = loss("extractors_test", kind="she", max_length=16, scale=False)
    attention = loss("gpt2_test", embed_dim=32, depth=2, num_heads=4, max_positions=16, dropout=0.0)
    assert she + 0.1 < attention < text.entropy - 0.5


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"max_length": 16}, "There are 16 slots, too few for 24 tokens"),
        ({"kind": "x"}, "kind='x' is none of 'she', 'he'"),
        ({"index": "x"}, "index='x' is none of 'relative'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    model = zoo.create("extractors_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))
