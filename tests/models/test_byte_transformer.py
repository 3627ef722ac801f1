import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.language import byte_transformer
from zoo.models.language.byte_transformer import pack, places_of, rows_for, unpack

LENGTHS = np.array([40, 1, 30, 0, 17])
MASK = np.arange(40) < LENGTHS[:, None]


def tokens(seed=0):
    return np.random.default_rng(seed).integers(97, size=MASK.shape).astype(np.int32)


def types():
    return (np.arange(40) > 10).astype(np.int32) * np.ones((5, 1), np.int32)


@pytest.fixture(scope="module")
def padded():
    """BERT's own hidden states of the padded batch, and the variables of both."""
    model = zoo.create("bert_test")
    variables = filled(model)
    run = jax.jit(lambda v, x, t, m: model.apply(v, x, t, m, method="features"))
    return variables, run(variables, tokens(), types(), MASK)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(byte_transformer.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize("packed", [False, True])
def test_packed_texts_are_padded_texts(padded, packed):
    """Of lengths 40 (all), 1, 30, none at all and 17: 88 rows of 200."""
    variables, want = padded
    model = zoo.create("byte_transformer_test", rows=rows_for(MASK, 8), packed=packed)
    run = jax.jit(lambda v: model.apply(v, tokens(), types(), MASK, method="features"))
    got = run(variables)
    hidden = np.where(MASK[..., None], want["last_hidden_state"], 0)
    assert_trees_close(got["last_hidden_state"], hidden, 1e-5)
    assert_trees_close(got["packed_hidden"][:88], hidden[MASK], 1e-5)
    real = LENGTHS > 0
    assert_trees_close(got["pooled"][real], want["pooled"][real], 1e-5)


def test_holes_in_a_text_keep_their_positions(padded):
    variables, _ = padded
    mask = MASK & (np.random.default_rng(1).random(MASK.shape) < 0.6)
    bert = zoo.create("bert_test")
    model = zoo.create("byte_transformer_test", rows=int(mask.sum()))
    want = jax.jit(bert.apply)(variables, tokens(), None, mask)
    got = jax.jit(model.apply)(variables, tokens(), None, mask)
    assert_trees_close(got, np.where(mask[..., None], want, 0), 1e-5)


def test_what_stands_at_padding_never_matters(padded):
    variables, _ = padded
    model = zoo.create("byte_transformer_test", rows=96)
    call = jax.jit(model.apply)
    garbage = np.where(MASK, tokens(), 1_000_000)
    np.testing.assert_array_equal(
        call(variables, garbage, None, MASK), call(variables, tokens(), None, MASK)
    )


def test_packing_is_invertible():
    x = np.random.default_rng(0).standard_normal((5, 40, 3)).astype("f")
    places = places_of(jnp.asarray(MASK), 96)
    rows = pack(jnp.asarray(x), places)
    np.testing.assert_array_equal(rows[:88], x[MASK])
    assert not rows[88:].any()
    np.testing.assert_array_equal(unpack(rows, places, 5, 40), np.where(MASK[..., None], x, 0))


def test_too_few_rows_are_noticed():
    model = zoo.create("byte_transformer_test", rows=80)
    assert np.isnan(jax.jit(model.apply)(filled(model), tokens(), None, MASK)[MASK]).all()
    assert rows_for(MASK, 8) == 88 and rows_for(MASK) == 128 and rows_for(0 * MASK) == 128


def test_the_maps_run_on_the_rows_alone():
    """Counted by the compiler: a batch that is filled by 0.44 costs less than half."""
    x = jax.ShapeDtypeStruct((16, 64), jnp.int32)

    def flops(rows):
        model = zoo.create("byte_transformer_test", embed_dim=128, mlp_dim=512, rows=rows)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        run = jax.jit(model.apply).lower(variables, x, x, x)
        return run.compile().cost_analysis()["flops"]

    assert flops(450) < 0.55 * flops(1024)


def test_files_of_bert_fit():
    model, bert = zoo.create("byte_transformer_test"), zoo.create("bert_test")
    state = zoo.export(bert, filled(bert))
    assert_trees_close(zoo.convert(model, state), zoo.convert(bert, state), 0)


@pytest.mark.parametrize(
    "fields, arguments, sentence",
    [
        ({"max_positions": 30}, (), "reads at most 30 tokens, not 40"),
        ({"num_heads": 5}, (), "num_heads=5 does not divide 32 channels"),
        ({}, (types()[:, :7],), "token_types has shape"),
        ({"activation": "x"}, (), "activation='x' is none of"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, arguments, sentence):
    model = zoo.create("byte_transformer_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(), *arguments))
