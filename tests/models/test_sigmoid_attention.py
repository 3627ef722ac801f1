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
    sin_loss,
)

import kernels_pallas
import zoo
from zoo.layers.causal import Context
from zoo.models.language import sigmoid_attention
from zoo.models.language.sigmoid_attention import SigmoidAttention, alibi_slopes


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


def weights_of(model, variables, x, mask=None):
    """The attention weights of the first block."""
    _, seen = jax.jit(lambda v: model.apply(v, x, mask, mutable=["intermediates"]))(variables)
    return seen["intermediates"]["layers_0"]["attention"]["attention"][0]


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(sigmoid_attention.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize("position", ["alibi", "rope"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_sum_over_its_weights(position, causal):
    """The weights are formed densely from the definition; the output by the kernel."""
    module = SigmoidAttention(4, position=position, causal=causal, bias=-3.0, temperature=0.3)
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))
    context = Context(jnp.ones((2, 24), bool).at[1, 15:].set(False))
    variables = jax.jit(lambda k: module.init(k, x, context=context))(jax.random.key(1))
    variables = variables | {"params": jax.tree.map(lambda p: p * 8, variables["params"])}
    (y, _), seen = module.apply(variables, x, context=context, mutable=["intermediates"])
    weights = seen["intermediates"]["attention"][0]
    p = variables["params"]
    value = (x @ p["qkv"]["kernel"])[..., 64:].reshape(2, 24, 4, 8)
    want = jnp.einsum("bnqk,bknd->bqnd", weights, value).reshape(x.shape) @ p["out"]["kernel"]
    assert_trees_close(y, want, 1e-5)
    if causal:
        assert not np.triu(weights, 1).any()


@pytest.mark.parametrize(
    "options",
    [{"mask": kernels_pallas.Causal()}, {"mask": kernels_pallas.SlidingWindow(5, 2)},
     {"slopes": jnp.asarray(alibi_slopes(4))}],
    ids=["causal", "window", "alibi"],
)  # fmt: skip
def test_the_kernel_is_the_definition_forward_and_backward(options):
    """Two key heads for four query heads, and a bias of -2."""
    key = lambda i, n: jax.random.normal(jax.random.key(i), (2, 24, n, 8))  # noqa: E731
    args = key(0, 4), key(1, 2), key(2, 2)

    def fast(q, k, v):
        return kernels_pallas.attention(q, k, v, score=kernels_pallas.Sigmoid(-2.0), **options)

    def plain(q, k, v):
        k, v = (jnp.repeat(t, 2, axis=2) for t in (k, v))
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k) * 8**-0.5
        at = jnp.arange(24)
        if "slopes" in options:
            away = jnp.abs(at - at[:, None])
            scores = scores - options["slopes"][:, None, None] * away
        weights = jax.nn.sigmoid(scores - 2.0)
        if "mask" in options:
            weights = jnp.where(options["mask"](at[:, None], at), weights, 0)
        return jnp.einsum("bnqk,bknd->bqnd", weights, v)

    def both(f):
        return jax.jit(lambda *a: (f(*a), jax.grad(lambda a: sin_loss(f(*a)))(a)))(*args)

    assert_trees_close(both(fast), both(plain), 1e-5)


def test_rows_add_up_to_about_one_where_training_starts():
    fields = dict(causal=False, position="none", query_key_norm=False)
    model = zoo.create("sigmoid_attention_test", train_length=40, **fields)
    x = tokens()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rows = weights_of(model, variables, x).sum(-1)
    assert 0.3 < rows.min() and rows.max() < 3
    zero = zoo.create("sigmoid_attention_test", bias=0.0, **fields)
    started = jax.jit(zero.init)(jax.random.key(0), x)
    assert weights_of(zero, started, x).sum(-1).min() > 10


def test_padding_is_seen_by_nobody():
    model = zoo.create("sigmoid_attention_test", causal=False)
    variables, x = filled(model), tokens(length=29)
    padded = np.pad(x, ((0, 0), (0, 11)), constant_values=3)
    mask = np.arange(40) < np.array([[29], [29]])
    call = jax.jit(model.apply)
    assert_trees_close(call(variables, padded, mask)[:, :29], call(variables, x), 1e-5)
    assert not weights_of(model, variables, padded, mask)[..., 29:].any()


def test_tokens_without_positions_can_change_places():
    model = zoo.create("sigmoid_attention_test", causal=False, position="none")
    variables, x = filled(model), tokens()
    order = np.random.default_rng(1).permutation(40)
    call = jax.jit(model.apply)
    assert_trees_close(call(variables, x[:, order]), call(variables, x)[:, order], 1e-5)


def test_huge_scores_stay_finite():
    q = 1e4 * jax.random.normal(jax.random.key(0), (1, 16, 2, 8))

    def run(q):
        return kernels_pallas.attention(q, q, q, score=kernels_pallas.Sigmoid(-3.0))

    assert np.isfinite(run(q)).all()
    assert np.isfinite(jax.grad(lambda q: run(q).sum())(q)).all()


def test_slopes_of_any_number_of_heads():
    np.testing.assert_allclose(alibi_slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_fixed_numbers_of_a_file_are_loaded():
    model = zoo.create("sigmoid_attention_test")
    variables, x = filled(model), tokens()
    state = zoo.export(model, variables)
    state["blocks.0.attn.attn_bias"] = np.float32([1.5])
    other = zoo.convert(model, state)
    assert np.abs(jax.jit(model.apply)(other, x) - jax.jit(model.apply)(variables, x)).max() > 0.01


@pytest.mark.slow
def test_text_is_learned_as_with_softmax():
    """Characters, 32 at a time, with b = -log 32 and RoPE.

    With ALiBi, whose penalties are added to b, sigmoids are 0.1 behind after so few steps.
    """
    text = Characters(32)

    def loss(activation):
        model = zoo.create(
            "sigmoid_attention_test", vocab_size=text.count, embed_dim=64, train_length=32,
            position="rope", layer_scale=None, activation=activation,
        )  # fmt: skip
        return text.held_out_loss(model, steps=400, rate=5e-3, batch=32)

    softmax = loss("softmax")
    assert softmax < text.entropy - 1
    assert abs(loss("sigmoid") - softmax) < 0.05


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"activation": "x"}, "activation='x' is none of 'softmax', 'sigmoid'"),
        ({"position": "x"}, "position='x' is none of 'alibi'"),
        ({"num_heads": 5}, "num_heads=5 does not divide 32 channels"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    model = zoo.create("sigmoid_attention_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))
