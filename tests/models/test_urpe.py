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
    filled_state_dict,
    sin_loss,
)

import zoo
from zoo.layers.attention import Attention, attention_weights
from zoo.models.language import urpe
from zoo.models.language.urpe import UrpeAttention, log_buckets, unique_buckets, urpe_attention


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(2, 97, size=(batch, length)).astype(np.int32)


def heads(seed, length=24):
    return jax.random.normal(jax.random.key(seed), (2, length, 4, 8))


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(urpe.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_the_definition_forward_and_backward(monkeypatch, causal):
    """Five blocks of queries; gradients of both tables, too."""
    monkeypatch.setattr(urpe, "BLOCK_SCORES", 5 * 2 * 4 * 24)
    b, c = (jax.random.normal(jax.random.key(i), (4, 24, 24)) for i in (3, 4))
    visible = jnp.ones((2, 24), bool).at[1, 17:].set(False)

    def blocks(q, k, v, b, c):
        return urpe_attention(q, k, v, b, c, visible, causal)

    def plain(q, k, v, b, c):
        hidden = jnp.where(np.tri(24, dtype=bool) | (not causal), 0.0, -1e30)
        weights = attention_weights(q, k, bias=b[None] + hidden, visible=visible)
        return jnp.einsum("bnqk,bknd->bqnd", weights * c, v)

    def both(f):
        args = heads(0), heads(1), heads(2), b, c
        return jax.jit(lambda *a: (f(*a), jax.grad(lambda a: sin_loss(f(*a)))(a)))(*args)

    assert_trees_close(both(blocks), both(plain), 1e-5)


def test_tables_that_say_nothing_are_plain_attention():
    """b = 0 and c = 1 leave self-attention; c = 1 alone leaves relative positions."""
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))
    module, visible = UrpeAttention(4), jnp.ones((2, 24), bool)
    variables = jax.jit(lambda k: module.init(k, x, None, None, visible))(jax.random.key(1))
    variables = jax.tree.map(lambda p: p * 8, variables)
    b, ones = jax.random.normal(jax.random.key(3), (4, 24, 24)), jnp.ones((4, 24, 24))
    call = jax.jit(lambda b, c: module.apply(variables, x, b, c, visible))
    full = jax.jit(Attention(4, fused=False).apply)(variables, x)
    assert_trees_close(call(0 * b, ones), full, 1e-5)
    assert_trees_close(call(b, ones), call(b, None), 1e-5)
    assert np.abs(call(b, ones) - full).max() > 0.01


def test_equal_tokens_have_places_only_behind_the_softmax():
    x = np.full((1, 40), 7, np.int32)
    for universal in (False, True):
        model = zoo.create("urpe_test", universal=universal, head=None)
        y = jax.jit(model.apply)(filled(model), x)[0]
        apart = np.abs(y - y[:1]).max() / np.abs(y).max()
        assert apart > 0.01 if universal else apart < 1e-5


def test_padding_changes_nothing():
    model = zoo.create("urpe_test", use_positions=True, head=None)
    variables, x = filled(model), tokens(length=29)
    padded = np.pad(x, ((0, 0), (0, 11)), constant_values=1)
    call = jax.jit(model.apply)
    assert_trees_close(call(variables, padded)[:, :29], call(variables, x), 1e-5)


def test_the_word_head_of_a_file_is_its_embedding():
    model = zoo.create("urpe_test")
    state = filled_state_dict(model)
    with pytest.raises(ValueError, match="tied tensors differ in value"):
        zoo.convert(model, state)
    state["encoder.lm_head.weight"] = state["encoder.sentence_encoder.embed_tokens.weight"]
    assert zoo.export(model, zoo.convert(model, state)).keys() == state.keys()
    encoder = model.clone(head=None)
    assert not any("lm_head" in name for name in zoo.export(encoder, filled(encoder)))


def test_buckets_grow_with_the_distance():
    table = log_buckets(64, 16, 32)
    row = table[32]
    assert row[32] not in (row[31], row[33])  # the token itself stands apart
    assert (np.diff(row) >= 0).all() and row.min() == 0 and row.max() <= 16
    assert len(set(row[33:])) == 7 and row[33] != row[34] and row[60] == row[63]
    assert (unique_buckets(5) == np.arange(5)[None] - np.arange(5)[:, None] + 4).all()


@pytest.mark.slow
def test_places_of_equal_tokens_are_learned_with_c_alone():
    """Position identification: 32 equal tokens, each tells its place; chance is 1/32."""
    x = jnp.full((1, 32), 40)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 3e-3, 50, 500))

    def accuracy(universal):
        model = zoo.create("urpe_test", embed_dim=64, mlp_dim=128, universal=universal)

        def loss(params):
            logits = model.apply({"params": params}, x)
            right = (logits.argmax(-1) == jnp.arange(32)).mean()
            labels = jnp.arange(32)[None]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), right

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                grads, right = jax.grad(loss, has_aux=True)(params)
                updates, state = optimizer.update(grads, state)
                return (optax.apply_updates(params, updates), state), right

            return jax.lax.scan(step, (params, optimizer.init(params)), length=500)[1]

        return train(jax.jit(model.init)(jax.random.key(0), x)["params"])[-1]

    assert accuracy(True) > 0.99
    assert accuracy(False) < 0.1


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"max_length": 30}, "reads at most 30 tokens, not 40"),
        ({"num_heads": 5}, "num_heads=5 does not divide 32 channels"),
        ({"head": "x"}, "head='x' is none of None, 'language_model'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    model = zoo.create("urpe_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))
