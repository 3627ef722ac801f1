import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    learn,
    token_loss,
)

import zoo
from zoo.layers.attention import attention_weights
from zoo.models.language import combiner
from zoo.models.language.combiner import (
    axial_attention,
    fixed_attention,
    logsparse_attention,
    logsparse_sets,
    span_for,
    together,
)


def tokens(batch=2, length=36, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


def heads(seed, length=24):
    return jax.random.normal(jax.random.key(seed), (2, length, 3, 8))


def full(q, k, v, causal=True):
    length = q.shape[1]
    hidden = jnp.where(np.tri(length, dtype=bool) | (not causal), 0.0, -1e30)[None, None]
    return jnp.einsum("bnqk,bknd->bqnd", attention_weights(q, k, bias=hidden), v)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(combiner.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("span", [1, 24])
def test_spans_of_one_token_or_of_all_are_full_attention(causal, span):
    q, k, v = heads(0), heads(1), heads(2)
    got = fixed_attention(q, k, v, span, causal=causal)
    assert_trees_close(got, full(q, k, v, causal), 1e-5)


def test_one_row_is_full_attention():
    q, k, v = heads(0), heads(1), heads(2)
    assert_trees_close(axial_attention(q, k, v, 24), full(q, k, v), 1e-5)


@pytest.mark.parametrize("length", [2, 16, 17, 24, 37])
def test_the_sets_of_a_token_are_all_tokens_up_to_it_each_once(length):
    span, there = logsparse_sets(length)
    for i in range(length):
        seen = [i]
        for level in np.flatnonzero(there[i]):
            size = 1 << level
            seen += range(span[i, level] * size, (span[i, level] + 1) * size)
        assert sorted(seen) == list(range(i + 1))


def test_regions_that_knew_their_tokens_would_be_full_attention():
    """The true probabilities inside of each region, and the sum of its scores: any cut is exact."""
    q, k, v = heads(0), heads(1), heads(2)
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k) * 8**-0.5
    span, there = logsparse_sets(24)
    own = jnp.einsum("bqnd,bqnd->bnq", q, k)[..., None] * 8**-0.5
    logits, values = [], []
    for level in range(span.shape[1]):
        inside = (np.arange(24)[None] >> level) == span[:, level : level + 1]
        part = jnp.where(inside, scores, -1e30)
        logits.append(jnp.where(there[:, level], jax.nn.logsumexp(part, -1), -1e10))
        values.append(jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(part, -1), v))
    near, far = together(own, jnp.stack(logits, -1))
    got = near.swapaxes(1, 2) * v + jnp.einsum("bnql,lbqnd->bqnd", far, jnp.stack(values))
    assert_trees_close(got, full(q, k, v), 1e-5)


def test_equal_keys_weigh_by_their_number_only_with_the_bias():
    q, v = heads(0), heads(2)
    k = jnp.broadcast_to(heads(1)[:, :1], q.shape)
    same = jnp.broadcast_to(q[:, :1], q.shape)
    for run in (
        lambda **how: fixed_attention(same, k, v, 4, causal=True, **how),
        lambda **how: logsparse_attention(same, k, v, **how),
    ):
        assert_trees_close(run(size_bias=True), full(same, k, v), 1e-5)
        assert np.abs(run() - full(same, k, v)).max() > 0.01


@pytest.mark.parametrize("kind", combiner.KINDS)
def test_later_tokens_are_never_seen_and_all_earlier_ones_are(kind):
    model = zoo.create("combiner_test", kind=kind, depth=1)
    variables, x = filled(model), tokens()
    embed = variables["params"]["embed"]["embedding"]

    def last(rows):
        """Logits of a middle token, from the embedded text."""
        params = {**variables["params"], "embed": {"embedding": rows}}
        return model.apply({"params": params}, np.arange(36)[None])[0, 20]

    rows = embed[x[0]]
    rows = jnp.concatenate([rows, embed[: 97 - 36]])
    reached = np.abs(jax.jit(jax.jacobian(last))(rows)).max((0, 2))[:36] > 0
    assert not reached[21:].any()
    assert reached[:21].mean() > 0.8  # a largest channel of a span is of few of its keys


def test_the_cost_is_far_below_that_of_full_attention():
    """Counted by the compiler at 4,096 tokens; the axial form sees most tokens twice."""
    x = jax.ShapeDtypeStruct((1, 4096, 1, 32), jnp.float32)

    def flops(run):
        return jax.jit(run).lower(x, x, x).compile().cost_analysis()["flops"]

    whole = flops(full)
    assert flops(lambda q, k, v: fixed_attention(q, k, v, 64, causal=True)) < 0.1 * whole
    assert flops(logsparse_attention) < 0.1 * whole
    assert flops(lambda q, k, v: axial_attention(q, k, v, 64)) < 0.15 * whole


def test_spans_divide_the_text():
    assert [span_for(n) for n in (1, 16, 36, 128, 37)] == [1, 4, 6, 8, 1]
    model = zoo.create("combiner_test", span=8)
    with pytest.raises(ValueError, match="Spans of 8 do not divide 36 tokens"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))


@pytest.mark.slow
def test_periodic_text_is_learned_as_with_full_attention():
    """64 random letters and the same 64 again: in rows of 64 the letter to copy stands above."""

    def draw(key):
        return jnp.tile(jax.random.randint(key, (8, 64), 0, 8), (1, 2))

    def loss_of(kind, span):
        model = zoo.create("combiner_test", vocab_size=8, depth=1, kind=kind, span=span)

        def loss(variables, x):
            return token_loss(model.apply(variables, x), x, 65)

        variables = jax.jit(model.init)(jax.random.key(0), draw(jax.random.key(0)))
        _, losses = learn(loss, variables, draw, steps=500, rate=6e-3)
        return losses[-20:].mean()  # no text comes twice

    full = loss_of("fixed", 128)  # one span: no regions
    assert full < 0.5  # of log 8 = 2.08
    assert loss_of("axial", 64) < full + 0.05


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"kind": "x"}, "kind='x' is none of 'fixed', 'logsparse'"),
        ({"kind": "axial", "causal": False}, "kind='axial' is causal"),
        ({"num_heads": 5}, "num_heads=5 does not divide 32 channels"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    model = zoo.create("combiner_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))
