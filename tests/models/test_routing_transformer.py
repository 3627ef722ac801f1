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
from zoo.models.language import routing_transformer
from zoo.models.language.routing_transformer import (
    kmeans_step,
    members,
    nearest_means,
    place,
    routed_attention,
    unit,
)


def tokens(batch=2, length=48, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


def heads(seed, length=32, dim=8):
    return jax.random.normal(jax.random.key(seed), (2, 3, length, dim))


NO_MEMORY = (jnp.zeros((3, 1, 0, 8)),) * 2


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(routing_transformer.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize("causal", [True, False])
def test_one_cluster_of_all_tokens_is_full_attention(causal):
    q, k, v = heads(0), heads(1), heads(2)
    at = members(unit(q), unit(heads(3, 1))[0], 32)
    got = routed_attention(q, k, v, at, at, NO_MEMORY, causal=causal, shared=False)
    bias = jnp.where(np.tri(32, dtype=bool) | (not causal), 0.0, -1e30)[None, None]
    weights = attention_weights(q.swapaxes(1, 2), k.swapaxes(1, 2), bias=bias)
    want = jnp.einsum("bnqk,bnkd->bnqd", weights, v) / (1 + 1e-5)
    assert_trees_close(got, want, 1e-5)


def test_members_never_look_forward():
    """With the clusters held fixed, what a token gets does not depend on later values."""
    q, k, v = heads(0), heads(1), heads(2)
    means = unit(heads(3, 4))[0]
    at = members(unit(q), means, 8)
    memory = (jnp.zeros((3, 4, 0, 8)),) * 2

    def attended(v):
        return routed_attention(q, k, v, at, at, memory, causal=True, shared=True)

    reached = jax.jit(jax.jacobian(lambda v: attended(v)[0, 0].sum(-1)))(v)[:, 0, 0]
    reached = np.abs(reached).max(-1) > 0
    assert reached.any() and not np.triu(reached, 1).any()


def test_the_step_of_the_means_is_that_of_a_loop():
    x, means = unit(heads(0)), unit(heads(1, 5))[0]
    want = np.array(means)
    for h in range(3):
        sums, counts = np.zeros((5, 8)), np.zeros(5)
        for b in range(2):
            for vector in np.asarray(x[b, h]):
                nearest = np.argmax(np.asarray(means[h]) @ vector)
                sums[nearest] += vector
                counts[nearest] += 1
        for c in np.flatnonzero(counts):
            want[h, c] = sums[c] / np.linalg.norm(sums[c])
    assert_trees_close(kmeans_step(x, means), want, 1e-5)


def test_means_move_in_training_towards_their_tokens():
    """The loss falls; `place_means` starts nearer to the tokens than anywhere does."""
    model = zoo.create("routing_transformer_test", depth=1, local_heads=0, window=16)
    variables, x = filled(model), tokens(4, 64)
    run = jax.jit(lambda v: model.apply(v, x, train=True, method="features", mutable="batch_stats"))
    losses = []
    for _ in range(60):
        out, changed = run(variables)
        variables |= changed
        losses.append(float(out["aux_loss"]))
    assert losses[-1] < losses[0]
    placed = jax.jit(lambda v: model.apply(v, x, method="place_means", mutable="batch_stats"))
    _, changed = placed(variables)
    means = changed["batch_stats"]["layers_0"]["attention"]["means"]
    assert_trees_close(jnp.linalg.norm(means, axis=-1), jnp.ones(means.shape[:2]), 1e-5)
    anywhere = jax.tree.map(lambda m: unit(jax.random.normal(jax.random.key(0), m.shape)), changed)
    loss = jax.jit(lambda v: model.apply(v, x, method="features")["aux_loss"])
    assert loss(variables | changed) < 0.95 * loss(variables | anywhere)


def test_every_mean_has_tokens_after_placing():
    x = unit(heads(0, 200))
    nearest = nearest_means(x, place(x, 6))
    assert all(len(np.unique(nearest[:, h])) == 6 for h in range(3))


def test_means_stay_where_nothing_may_change():
    model = zoo.create("routing_transformer_test", window=16)
    variables, x = filled(model), tokens()
    run = jax.jit(lambda v: model.apply(v, x, mutable="batch_stats")[1])
    assert_trees_close(run(variables)["batch_stats"], variables["batch_stats"], 0)


def test_the_first_step_of_training_places_the_means():
    """As `place_means` does; then they move by the decay alone."""
    model = zoo.create("routing_transformer_test", depth=1, local_heads=0, window=16)
    x = tokens(4, 64)
    start = jax.jit(model.init)(jax.random.key(0), x)
    means = lambda v: v["batch_stats"]["layers_0"]["attention"]["means"]  # noqa: E731

    @jax.jit
    def step(v):
        return v | model.apply(v, x, train=True, mutable="batch_stats")[1]

    placed = jax.jit(lambda v: model.apply(v, x, method="place_means", mutable="batch_stats")[1])
    first = step(start)
    assert_trees_close(means(first), means(placed(start)), 1e-2)  # and one step
    assert_trees_close(means(step(first)), means(first), 1e-2)
    assert np.abs(means(start) - means(first)).max() > 0.5


@pytest.mark.slow
def test_a_far_key_is_found_by_routing_heads_and_not_by_local_ones():
    """The word before the first mark, one of 16, is asked for at marks at least 137 places on."""

    def draw(key):
        keys = jax.random.split(key, 3)
        label = jax.random.randint(keys[0], (8,), 0, 16)
        place = jax.random.randint(keys[1], (8,), 0, 63)
        x = jax.random.randint(keys[2], (8, 256), 0, 16)
        x = x.at[:, 200::8].set(32)
        rows = jnp.arange(8)
        return x.at[rows, place].set(16 + label).at[rows, place + 1].set(32), label

    def create(local_heads):
        return zoo.create(
            "routing_transformer_test", vocab_size=33, embed_dim=64, depth=1, max_length=256,
            head_dim=32, local_heads=local_heads, window=32, local_window=32,
            memory_slots=0, shift_tokens=True, decay=0.99,
        )  # fmt: skip

    def loss(variables, batch):
        x, label = batch
        out, changed = model.apply(
            variables, x, train=True, method="features", mutable="batch_stats"
        )
        said = out["logits"][:, 200::8]
        labels = jnp.broadcast_to(label[:, None], said.shape[:2])
        cost = optax.softmax_cross_entropy_with_integer_labels(said, labels).mean()
        return cost + out["aux_loss"], changed

    x, _ = draw(jax.random.key(0))
    model = create(0)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    variables, _ = learn(loss, variables, draw, steps=350)
    call, right = jax.jit(model.apply), []
    for key in jax.random.split(jax.random.key(2), 8):
        tokens, label = draw(key)
        right.append(call(variables, tokens)[:, 200::8].argmax(-1) == label[:, None])
    assert np.mean(right) > 0.9

    local = create(4)  # says the same whatever the word is
    variables, call = jax.jit(local.init)(jax.random.key(0), x), jax.jit(local.apply)
    other = jnp.where(x == 32, x, jnp.where(x < 16, x, 47 - x))
    assert (x != other).any(1).all()
    assert_trees_close(call(variables, other)[:, 200::8], call(variables, x)[:, 200::8], 0)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"max_length": 32}, "reads at most 32 tokens, not 48"),
        ({"window": 24}, "max_length=64 should be a multiple of window=24"),
        ({"local_heads": (2,)}, "should be 0 to 4 heads for each of 2 layers"),
        ({"norm": "x"}, "norm='x' is none of 'layer'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    model = zoo.create("routing_transformer_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))


def test_tied_layers_are_copies_of_the_first():
    fields = dict(vocab_size=13, embed_dim=8, num_heads=2, head_dim=4, local_heads=1)
    model = zoo.create("routing_transformer_test", **fields, weight_tied=True)
    variables = filled(model)
    assert set(variables["params"]["layers_1"]) == {"norm1", "norm2"}
    first, second = (variables["params"][f"layers_{i}"] for i in (0, 1))
    copies = {
        "params": {**variables["params"], "layers_1": {**first, **second}},
        "batch_stats": dict.fromkeys(
            ("layers_0", "layers_1"), variables["batch_stats"]["layers_0"]
        ),
    }
    x = tokens(1, 64) % 13
    plain = zoo.create("routing_transformer_test", **fields)
    found, wanted = (jax.jit(m.apply)(v, x) for m, v in ((model, variables), (plain, copies)))
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    with pytest.raises(ValueError, match="one number of local_heads"):
        zoo.create("routing_transformer_test", weight_tied=True, local_heads=(1, 2)).apply(
            variables, x
        )


def test_a_decoder_reads_what_of_its_memory_is_there():
    model = zoo.create("routing_transformer_test", depth=1, local_heads=0, cross_attention=True)
    variables, tokens = filled(model), np.arange(2 * 64).reshape(2, 64) % 97
    memory = np.random.default_rng(0).normal(size=(2, 24, 32)).astype(np.float32)
    there = np.arange(24) < np.array([24, 9])[:, None]
    run = jax.jit(lambda memory: model.apply(variables, tokens, memory=memory, memory_mask=there))
    out = run(memory)
    # One cluster holds all of it, so that what is hidden changes no membership.
    other = np.where(there[..., None], memory, -memory)
    np.testing.assert_allclose(run(other), out, atol=1e-5 * np.abs(out).max())
    assert np.abs(run(memory[:, ::-1]) - out)[1].max() > 1e-3
    with pytest.raises(ValueError, match=r"memory_mask has shape \(2, 9\); it should be \(2, 24\)"):
        model.apply(variables, tokens, memory=memory, memory_mask=there[:, :9])
