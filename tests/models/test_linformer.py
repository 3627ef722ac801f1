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
    sin_loss,
)

import zoo
from zoo.layers.attention import Attention
from zoo.models.language import linformer
from zoo.models.language.linformer import LinformerAttention


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(linformer.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


def test_projections_that_are_the_identity_are_full_attention():
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))
    visible = {"visible": None}
    module = LinformerAttention(24, 24, 4)
    variables = jax.jit(lambda k: module.init(k, x, visible))(jax.random.key(1))
    p = jax.tree.map(lambda p: p * 8, variables["params"])
    p |= {"project_key": jnp.eye(24), "project_value": jnp.eye(24)}
    plain = {k: p[k] for k in ("query", "key", "value", "out")}
    full = Attention(4, fused=False, qkv_bias=False)
    want = jax.jit(full.apply)({"params": plain}, x)
    got = jax.jit(lambda p: module.apply({"params": p}, x, visible))(p)
    assert_trees_close(got, want, 1e-5)


def test_padding_changes_nothing():
    model = zoo.create("linformer_test")
    variables, x = filled(model), tokens(length=29)
    padded = np.pad(x, ((0, 0), (0, 20)))
    mask = np.arange(49) < np.array([[29], [29]])
    call = jax.jit(model.apply)
    assert_trees_close(call(variables, padded, mask)[:, :29], call(variables, x), 1e-5)
    assert np.abs(call(variables, padded)[:, :29] - call(variables, x)).max() > 0.01


def test_each_layer_has_two_projections_more_than_a_transformer():
    def parameters(**fields):
        model = zoo.create("linformer_test", **fields)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens())
        return sum(p.size for p in jax.tree.leaves(shapes))

    n, k, d = 64, 16, 32
    block = 4 * d * d + d + 8 * d * d + 5 * d + 4 * d
    outside = 97 * d + n * d + 97 * d + 97
    assert parameters() == 2 * (block + 2 * n * k) + outside
    assert parameters(share_kv=True) == 2 * (block - d * d + n * k) + outside


def test_memory_grows_with_the_length_and_not_with_its_square():
    """Counted by the compiler: eight times the length takes about eight times as much."""

    def bytes_of(length):
        model = zoo.create("linformer_test", depth=1, max_length=length)
        x = jax.ShapeDtypeStruct((1, length), jnp.int32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        run = jax.jit(lambda v, x: model.apply(v, x).sum())
        return run.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(8192) < 10 * bytes_of(1024)


def test_the_reversible_form_has_the_gradient_of_its_definition():
    model = zoo.create("linformer_test", reversible=True, depth=3)
    variables, x = filled(model), tokens(2, 20)

    def by_hand(variables):
        """Two streams, differentiated as they stand."""
        layers = [linformer.ResidualLayer(
            LinformerAttention(64, 16, 4), 32) for _ in range(3)]  # fmt: skip
        p = variables["params"]
        embed = p["embed"]["embedding"][x] + p["position_embedding"][:20]
        x1 = x2 = embed
        for i, layer in enumerate(layers):
            inner, context = {"params": p[f"layers_{i}"]}, {"visible": None}
            x1 = x1 + layer.apply(inner, x2, context, method="attend")
            x2 = x2 + layer.apply(inner, x1, context, method="feed")
        return (x1 + x2) @ p["head"]["kernel"] + p["head"]["bias"]

    assert_trees_close(jax.jit(model.apply)(variables, x), jax.jit(by_hand)(variables), 1e-5)
    got = jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, x))))(variables)
    want = jax.jit(jax.grad(lambda v: sin_loss(by_hand(v))))(variables)
    assert_trees_close(got, want, 1e-4)


@pytest.mark.slow
def test_the_reversible_form_keeps_no_more_for_more_layers():
    def bytes_of(depth, reversible):
        model = zoo.create("linformer_test", reversible=reversible, depth=depth, max_length=512)
        x = jax.ShapeDtypeStruct((4, 512), jnp.int32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        run = jax.jit(jax.grad(lambda v, x: sin_loss(model.apply(v, x))))
        memory = run.lower(variables, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    more = bytes_of(8, True) - bytes_of(2, True)
    assert more < 0.35 * (bytes_of(8, False) - bytes_of(2, False))


@pytest.mark.slow
def test_hidden_words_are_told_as_with_full_attention():
    """64 tokens of period 4, of which 15 % are hidden; 16 projected rows, and the identity."""

    def draw(key):
        keys = jax.random.split(key, 2)
        x = jnp.tile(jax.random.randint(keys[0], (16, 4), 1, 32), (1, 16))
        return x, jax.random.bernoulli(keys[1], 0.15, x.shape)

    def loss_of(projected):
        full = projected == 64
        model = zoo.create(
            "linformer_test", vocab_size=32, embed_dim=64, max_length=64, projected=projected
        )

        def loss(variables, batch):
            x, hidden = batch
            logits = model.apply(variables, jnp.where(hidden, 0, x))
            every = optax.softmax_cross_entropy_with_integer_labels(logits, x)
            return (every * hidden).sum() / hidden.sum()

        variables = jax.jit(model.init)(jax.random.key(0), draw(jax.random.key(0))[0])
        if full:  # E = F = 1, and they stay so
            variables = jax.tree.map_with_path(
                lambda path, p: jnp.eye(64) if "project_" in str(path) else p, variables
            )
        _, losses = learn(
            loss, variables, draw, steps=400, trains=lambda path: not full or "project_" not in path
        )
        return losses[-20:].mean()  # no text comes twice

    full = loss_of(64)
    assert full < 0.5  # of log 31 = 3.43
    assert loss_of(16) < full + 0.1


@pytest.mark.parametrize(
    "fields, arguments, sentence",
    [
        ({"max_length": 30}, (), "reads at most 30 tokens, not 40"),
        ({"num_heads": 5}, (), "num_heads=5 does not divide 32 channels"),
        ({}, (tokens(2, 7),), "mask has shape"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, arguments, sentence):
    model = zoo.create("linformer_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(), *arguments))
