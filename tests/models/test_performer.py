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

import zoo
from zoo.layers.attention import attention_weights
from zoo.models.language import performer
from zoo.models.language.performer import linear_attention, orthogonal_features, softmax_features


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


def heads(seed, length=24, dim=8):
    return jax.random.normal(jax.random.key(seed), (2, length, 4, dim))


def mapped(features, query, key, **how):
    """Features of queries and keys, without a look at other tokens."""
    map_ = lambda x: softmax_features(x, features, is_query=False, strict=True, **how)  # noqa: E731
    return map_(query), map_(key)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(performer.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


def test_features_are_unbiased():
    """The mean of 2,000 draws of phi(q).phi(k) is exp(q.k / sqrt d), to three deviations."""
    q, k = 0.7 * heads(0, 1), 0.7 * heads(1, 1)

    @jax.jit
    @jax.vmap
    def estimate(key):
        features = orthogonal_features(key, (16, 8))
        a, b = mapped(features, q, k, epsilon=0.0)
        return (a * b).sum(-1)

    found = estimate(jax.random.split(jax.random.key(2), 2000))
    want = jnp.exp((q * k).sum(-1) * 8**-0.5)
    assert (jnp.abs(found.mean(0) - want) < 3.5 * found.std(0) / 2000**0.5).all()


def test_the_error_falls_with_the_root_of_the_number_of_features():
    """Sixteen times the features: a quarter of the error. Orthogonal rows beat independent ones."""
    q, k, v = 0.4 * heads(0), 0.4 * heads(1), heads(2)
    exact = jnp.einsum("bnqk,bknd->bqnd", attention_weights(q, k), v)

    @jax.jit
    @jax.vmap
    def errors(key):
        independent = jax.random.normal(jax.random.fold_in(key, 1), (16, 8))
        rows = (orthogonal_features(key, (16, 8)), orthogonal_features(key, (256, 8)), independent)
        outs = (linear_attention(*mapped(r, q, k, epsilon=0.0), v, False) for r in rows)
        return jnp.stack([jnp.sqrt(((out - exact) ** 2).mean()) for out in outs])

    few, many, independent = errors(jax.random.split(jax.random.key(3), 100)).mean(0)
    assert 2.8 < few / many < 5.5
    assert few < independent


@pytest.mark.parametrize("length", [7, 130])
def test_chunks_and_prefix_sums_and_the_matrix_agree(length):
    q, k, v = (jnp.abs(heads(i, length)) for i in range(3))
    got = jax.jit(lambda q, k, v: linear_attention(q, k, v, True))(q, k, v)
    weights = jnp.einsum("blnm,bsnm->bnls", q, k) * np.tri(length)
    added = 1e-6 * q.sum(-1).swapaxes(1, 2)
    matrix = jnp.einsum("bnls,bsnd->blnd", weights / (weights.sum(-1) + added)[..., None], v)
    sums = jnp.cumsum(jnp.einsum("blnm,blnd->blnmd", k, v), 1)
    below = (q * jnp.cumsum(k, 1)).sum(-1) + 1e-6 * q.sum(-1)
    prefix = jnp.einsum("blnm,blnmd->blnd", q, sums) / below[..., None]
    assert_trees_close(got, matrix, 1e-5)
    assert_trees_close(got, prefix, 1e-5)


@pytest.mark.parametrize(
    "fields, strict",
    [({}, False), ({"strict": True}, True), ({"generalized": True}, True),
     ({"projected": False}, True), ({"local_heads": 2, "local_window": 8}, False)],
    ids=["favor", "strict", "relu", "no features", "local heads"],
)  # fmt: skip
def test_later_tokens_are_not_seen(fields, strict):
    """Or by the little that the common bound of the keys lets through, as in the reference."""
    model = zoo.create("performer_test", **fields)
    variables, x = filled(model), tokens()
    changed = np.where(np.arange(40) < 25, x, (x + 1) % 97)
    call = jax.jit(model.apply)
    a, b = call(variables, x), call(variables, changed)
    leak = np.abs(a[:, :25] - b[:, :25]).max() / np.abs(a).max()
    assert leak < (1e-6 if strict else 1e-2)
    assert np.abs(a[:, 25:] - b[:, 25:]).max(-1).min() > 1e-3
    if not fields:
        assert leak > 1e-6  # what `strict` is for


def test_redrawn_features_are_other_orthogonal_rows():
    model = zoo.create("performer_test")
    variables = jax.jit(model.init)(jax.random.key(0), tokens())
    redrawn = performer.redraw_features(variables, jax.random.key(1))
    layers = [tree["batch_stats"][f"layers_{i}"]["attention"]["features"]
              for tree in (variables, redrawn) for i in range(2)]  # fmt: skip
    for i, rows in enumerate(layers):
        gram = rows[:8] @ rows[:8].T
        off = gram - jnp.diag(jnp.diag(gram))
        assert np.abs(off).max() < 1e-5 * gram.max()
        for other in layers[:i]:
            assert np.abs(rows - other).max() > 0.1
    assert_trees_close(redrawn["params"], variables["params"], 0)


def test_the_reversible_form_has_the_gradient_of_its_definition():
    model = zoo.create("performer_test", reversible=True)
    variables, x = filled(model), tokens(2, 12)

    def by_hand(variables):
        p, fixed = variables["params"], variables["batch_stats"]
        x1 = x2 = p["embed"]["embedding"][x] + performer.sines_and_cosines(12, 32)
        for i in range(2):
            layer = model._layer(i)(parent=None)
            inner = {"params": p[f"layers_{i}"], "batch_stats": fixed[f"layers_{i}"]}
            x1 = x1 + layer.apply(inner, x2, {"visible": None}, method="attend")
            x2 = x2 + layer.apply(inner, x1, {"visible": None}, method="feed")
        y = performer.LayerNorm(epsilon=1e-5).apply({"params": p["norm"]}, x1 + x2)
        return y @ p["head"]["kernel"] + p["head"]["bias"]

    def gradient(f):
        return jax.jit(jax.grad(lambda p: sin_loss(f({**variables, "params": p}))))(
            variables["params"]
        )

    got, want = gradient(lambda v: model.apply(v, x)), gradient(by_hand)
    assert_trees_close(got, want, 1e-4)


@pytest.mark.slow
def test_text_is_learned_as_with_softmax():
    """Characters, 256 at a time; the softmax is that of local heads whose block is all of it."""
    text = Characters(256)

    def loss(local_heads):
        model = zoo.create(
            "performer_test", vocab_size=text.count, depth=1, max_length=256, features_per_head=32,
            local_window=256, local_heads=local_heads,
        )  # fmt: skip
        return text.held_out_loss(model, steps=400, rate=5e-3, batch=4)

    softmax = loss(4)
    assert softmax < text.entropy - 0.6
    assert loss(0) < softmax + 0.1


@pytest.mark.parametrize(
    "fields, arguments, sentence",
    [
        ({"max_length": 30}, (), "reads at most 30 tokens, not 40"),
        ({"norm": "x"}, (), "norm='x' is none of 'layer', 'scale', 'rezero'"),
        ({"local_heads": 5}, (), "should be 0 to 4 heads for each of 2 layers"),
        ({}, (tokens(2, 7),), "mask has shape"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, arguments, sentence):
    model = zoo.create("performer_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(), *arguments))


@pytest.mark.parametrize("reversible", [False, True])
def test_a_decoder_reads_what_of_its_memory_is_there_and_gives_it_a_gradient(reversible):
    model = zoo.create("performer_test", depth=1, cross_attention=True, reversible=reversible)
    variables, tokens = filled(model), np.arange(12).reshape(2, 6)
    memory = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    there = np.arange(5) < np.array([5, 3])[:, None]

    @jax.jit
    def run(memory):
        out = model.apply(variables, tokens, memory=memory, memory_mask=there)
        return jnp.sum(jnp.sin(out))

    slope = jax.grad(run)(memory)
    assert np.abs(slope[there]).min() > 0
    changed = memory + np.eye(2, dtype=np.float32)[0][:, None, None]  # only of the first text
    assert np.abs(run(changed) - run(memory)) > 1e-3
    with pytest.raises(ValueError, match=r"memory is missing; give \("):
        model.apply(variables, tokens)
    plain = model.clone(cross_attention=False)
    with pytest.raises(ValueError, match="cross_attention=False; leave out memory"):
        plain.apply(variables, tokens, memory=memory)
