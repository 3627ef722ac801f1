import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.series import DatedEmbedding
from zoo.models.timeseries import informer
from zoo.models.timeseries.informer import kept, prob_sparse_attention, sparsity


def heads(length=16, key=0):
    return jax.random.normal(jax.random.key(key), (3, 2, length, 4, 8))


def softmax_attention(q, k, v, causal=False):
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k) / 8**0.5
    if causal:
        scores = jnp.where(np.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores, -1), v)


def draw(length, count, key=0):
    return jax.random.randint(jax.random.key(key), (length, count), 0, length)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(informer.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_the_measure_is_the_one_of_the_code():
    """Its sum is over the sampled keys, its divisor the number of all keys."""
    (q, k, _), samples = np.asarray(heads()), np.asarray(draw(16, 5))
    got = sparsity(q, k, samples)
    for b, n, i in np.ndindex(2, 4, 16):
        scores = k[b, samples[i], n] @ q[b, i, n]
        np.testing.assert_allclose(got[b, n, i], scores.max() - scores.sum() / 16, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_with_every_query_kept_it_is_softmax_attention(causal):
    q, k, v = heads()
    got = prob_sparse_attention(q, k, v, draw(16, 16), 16, causal)
    np.testing.assert_allclose(got, softmax_attention(q, k, v, causal), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_that_are_not_kept_get_averages_and_the_others_attention(causal):
    (q, k, v), samples, count = heads(), draw(16, 6), 5
    got = prob_sparse_attention(q, k, v, samples, count, causal)
    chosen = np.zeros((2, 4, 16), bool)
    order = np.argsort(-np.asarray(sparsity(q, k, samples)), -1)[..., :count]
    np.put_along_axis(chosen, order, True, -1)
    chosen = chosen.swapaxes(1, 2)[..., None]
    rest = v.cumsum(1) if causal else jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)
    wanted = jnp.where(chosen, softmax_attention(q, k, v, causal), rest)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_causal_rows_do_not_depend_on_later_values():
    (q, k, v), samples = heads(), draw(16, 6)
    first = prob_sparse_attention(q, k, v, samples, 6, causal=True)
    other = prob_sparse_attention(q, k, v.at[:, 9:].set(7.0), samples, 6, causal=True)
    np.testing.assert_array_equal(first[:, :9], other[:, :9])
    assert np.abs(first[:, 9:] - other[:, 9:]).max() > 0.1


def test_the_number_of_kept_queries():
    assert [kept(n, 5) for n in (96, 48, 72, 16, 8)] == [25, 20, 25, 15, 8]


def inputs(model, key=0):
    spec = model.example_inputs(2)
    keys = jax.random.split(jax.random.key(key), len(spec))
    return {n: jax.random.normal(k, s.shape) for k, (n, s) in zip(keys, spec.items(), strict=True)}


def test_the_key_draws_the_sampled_keys():
    model = zoo.create("informer_test", factor=1, depth=1)
    variables, x = filled(model), inputs(model)
    run = jax.jit(lambda key: model.apply(variables, **x, rngs={"sample": key}))
    first, again, other = (run(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    plain = jax.jit(lambda: model.apply(variables, **x))
    np.testing.assert_array_equal(plain(), plain())


def test_the_decoder_sees_the_last_label_steps_and_future_marks():
    model = zoo.create("informer_test", sparse=False, depth=1)
    variables, x = filled(model), inputs(model)
    run = jax.jit(lambda x: model.apply(variables, **x))
    first = run(x)
    assert first.shape == (2, 8, 3)
    later = {**x, "future_time_features": x["future_time_features"].at[:, -1].add(1.0)}
    assert np.abs(run(later) - first).max() > 1e-3
    with pytest.raises(ValueError, match=r"takes future_time_features of shape \(batch, 8, 4\)"):
        model.apply(variables, **{**x, "future_time_features": x["future_time_features"][:, :4]})


def test_the_encoder_alone_reconstructs_and_classifies():
    """At the full length: only a forecaster distils."""
    x = jax.random.normal(jax.random.key(0), (2, 24, 3))
    model = zoo.create("informer_test", decoder_depth=0, time_features=0, horizon=24)
    variables = filled(model)
    out = jax.jit(lambda: model.apply(variables, x, method="features"))()
    assert out["encoder"].shape == (2, 24, 32) and out["forecast"].shape == (2, 24, 3)
    assert not any(n.startswith(("decoder", "distil")) for n in variables["params"])
    state = zoo.export(model, variables)
    assert state["projection.weight"].shape == (3, 32) and not any("dec_" in n for n in state)
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, state), variables)

    model = zoo.create("informer_test", num_classes=4, time_features=0, masked=True)
    variables = filled(model)
    assert variables["params"]["head"]["kernel"].shape == (24 * 32, 4)
    run = jax.jit(lambda mask: model.apply(variables, x, mask=mask))
    mask = jnp.arange(24) < jnp.array([[24], [12]])
    change = np.abs(run(mask) - run(mask | True)).max(1)
    assert change[0] == 0 and change[1] > 1e-3


def test_each_encoder_of_a_stack_reads_half_of_the_one_before():
    model = zoo.create("informer_test", stacks=(3, 2), depth=9)
    variables, x = filled(model), inputs(model)
    run = jax.jit(lambda x: model.apply(variables, **x, method="features")["encoder"])
    memory = run(x)
    assert memory.shape == (2, 6 + 6, 32)  # 24 steps halved twice, 12 halved once
    change = np.abs(run({**x, "series": x["series"].at[:, 4:8].add(1.0)}) - memory).max((0, 2))
    assert (change[:6] > 1e-3).any() and (change[6:] == 0).all()
    state = zoo.export(model, variables)
    assert "encoder.encoders.0.conv_layers.1.norm.num_batches_tracked" in state
    assert "encoder.encoders.1.conv_layers.1.norm.num_batches_tracked" not in state
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, state), variables)


def test_fixed_tables_get_no_gradient_and_learned_ones_do():
    inputs = jnp.ones((1, 4, 3)), jnp.ones((1, 4, 4), "int32"), False
    for kind, name in (("fixed", "hour_table"), ("learned", "hour")):
        embedding = DatedEmbedding(8, kind, 4)
        variables = embedding.init(jax.random.key(0), *inputs)
        assert variables["params"][name].shape == (24, 8)
        grads = jax.grad(lambda v: jnp.sin(embedding.apply(v, *inputs)).sum())(variables)  # noqa: B023
        assert (np.abs(grads["params"][name]).max() > 0) == (kind == "learned")


@pytest.mark.slow
def test_it_learns_sines():
    time = np.arange(700)
    data = np.stack([np.sin(2 * np.pi * time / p) for p in (24, 12, 8)], 1).astype("f")
    windows = np.lib.stride_tricks.sliding_window_view(data, 32, axis=0).swapaxes(1, 2)
    x, y = jnp.asarray(windows[:, :24]), jnp.asarray(windows[:, 24:])
    model = zoo.create("informer_test", time_features=1, dropout=0.0, depth=1, factor=3)

    def forecast(variables, x):
        zeros = jnp.zeros((len(x), 32, 1))
        return model.apply(variables, x, zeros[:, :24], zeros[:, 24:])

    variables = jax.jit(model.init)(jax.random.key(0), x[:1], x[:1, :, :1], y[:1, :, :1])
    optimizer = optax.adam(3e-3)

    @jax.jit
    def learn(variables):
        def step(carry, index):
            variables, state = carry
            rows = jax.random.choice(jax.random.key(index), 500, (32,))
            loss = lambda v: jnp.mean((forecast(v, x[rows]) - y[rows]) ** 2)  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(variables), state)
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, (variables, optimizer.init(variables)), jnp.arange(150))[0][0]

    error = jnp.mean((jax.jit(forecast)(learn(variables), x[530:]) - y[530:]) ** 2)
    assert error < 0.1
