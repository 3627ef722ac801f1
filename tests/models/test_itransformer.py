import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    documented_shapes,
    feature_shapes,
    filled,
    learn_one_series_from_another,
)

import zoo
from zoo.models.timeseries import itransformer


def small(**fields):
    return zoo.create("itransformer_test", time_features=0, **fields)


def series(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def apply(model, variables, *inputs):
    return jax.jit(model.apply)(variables, *inputs)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(itransformer.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_variates_have_no_order():
    model, order = small(), np.array([3, 0, 4, 2, 1])
    variables, x = filled(model), series(2, 24, 5)
    forecast = apply(model, variables, x)
    got = apply(model, variables, x[:, :, order])
    np.testing.assert_allclose(got, forecast[:, :, order], atol=1e-5)
    assert np.abs(forecast - forecast[:, :, order]).max() > 0.1


def test_the_forecast_follows_scale_and_shift_of_each_series():
    model = small()
    variables, x = filled(model), series(2, 24, 5)
    scale, shift = jnp.array([0.5, 3, 10, 1, 2]), jnp.array([1.0, -5, 0, 100, 3])
    got = apply(model, variables, scale * x + shift)
    wanted = scale * apply(model, variables, x) + shift
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_the_same_weights_forecast_another_number_of_variates():
    model = small(variates=4)
    variables, x = filled(model), series(2, 24, 9)
    assert apply(model, variables, x).shape == (2, 12, 9)
    with pytest.raises(ValueError, match=r"takes series of shape \(batch, 24, variates\), not"):
        model.apply(variables, series(2, 25, 9))


def test_variates_see_each_other_and_marks():
    model = zoo.create("itransformer_test")
    variables, x, time_features = filled(model), series(1, 24, 5), series(1, 24, 4, key=1)
    forecast = apply(model, variables, x, time_features)
    assert forecast.shape == (1, 12, 5)
    other = apply(model, variables, x.at[:, :, 4].set(series(1, 24)), time_features)
    assert np.abs(other - forecast)[:, :, :4].max() > 1e-3
    assert np.abs(apply(model, variables, x, 2 * time_features) - forecast).max() > 1e-3


def test_time_features_that_do_not_fit_are_refused():
    model = zoo.create("itransformer_test")
    variables, x = filled(model), series(1, 24, 5)
    with pytest.raises(
        ValueError, match=r"takes time_features of shape \(batch, 24, 4\), not None; give"
    ):
        model.apply(variables, x)
    with pytest.raises(ValueError, match="takes no time_features; create it with time_features=4"):
        small().apply(variables, x, series(1, 24, 4))


def test_a_classifier_flattens_all_variates():
    model = small(num_classes=3)
    variables, x = filled(model), series(2, 24, 5)
    assert apply(model, variables, x).shape == (2, 3)
    kernel = variables["params"]["head"]["kernel"]
    assert kernel.shape == (5 * 32, 3)
    order = np.array([1, 0, 2, 3, 4])
    swapped = apply(model, variables, x[:, :, order])
    assert np.abs(swapped - apply(model, variables, x)).max() > 1e-3


def test_it_learns_one_series_from_another():
    errors, alone = learn_one_series_from_another(
        small(variates=2, standardise=False, depth=1, dropout=0.0)
    )
    assert errors[1] < 0.3 < 0.8 < errors[0] and alone > 0.8


def test_flow_attention_is_its_matrix_form():
    q, k, v = np.random.RandomState(0).normal(size=(3, 2, 7, 3, 4))
    got = itransformer.flow_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    q, k = 1 / (1 + np.exp(-q)), 1 / (1 + np.exp(-k))
    pairs = np.einsum("bind,bjnd->bnij", q + 1e-6, k)
    inward, outward = pairs.sum(-1), np.einsum("bjnd,bind->bnij", k + 1e-6, q).sum(-2)
    allocation = 1 / (1 + np.exp(-(pairs / outward[:, :, None]).sum(-1)))
    competition = np.exp((pairs / inward[..., None]).sum(-2))
    competition *= 7 / competition.sum(-1, keepdims=True)
    matrix = np.einsum("bind,bjnd->bnij", q, k) * (allocation / inward)[..., None]
    wanted = np.einsum("bnij,bjnd->bind", matrix * competition[:, :, None], v)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_variants_share_weights_and_differ_in_attention():
    x = series(2, 24, 5)
    variables, found = filled(small()), {}
    for attention in ("softmax", "flow", "prob_sparse"):
        found[attention] = apply(small(attention=attention), variables, x)
    assert np.abs(found["flow"] - found["softmax"]).max() > 1e-3
    assert np.abs(found["prob_sparse"] - found["softmax"]).max() > 1e-3


def test_hashed_attention_is_softmax_inside_sorted_chunks():
    layer = itransformer.HashedAttention(num_heads=2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 11, 6)).astype(np.float32)
    shape = layer.rotation_shape(11, 6)
    assert shape == (3, 4, 2)  # 11 tokens and 5 zeros are 4 chunks of 4
    rotations = rng.normal(size=shape).astype(np.float32)
    variables = layer.init(jax.random.key(0), x, rotations)
    found = layer.apply(variables, x, rotations)
    params = jax.tree.map(np.asarray, variables["params"])
    whole = np.pad(x[0], ((0, 5), (0, 0)))
    heads = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        q = (whole @ params["query_key"]["kernel"])[:, part]
        v = (whole @ params["value"]["kernel"])[:, part]
        k = q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-12)
        order = []
        for r in range(4):
            near = np.concatenate([q @ rotations[:, r], -q @ rotations[:, r]], 1).argmax(1)
            order += [(r, token) for token in np.argsort(near, kind="stable")]
        sums, weights = np.zeros((4, 16, 3)), np.zeros((4, 16))
        for place, (r, token) in enumerate(order):
            first = place // 4 * 4
            seen = [order[(first - 4 + i) % 64][1] for i in range(8)]
            score = np.array([-5e4 if s == token else q[token] @ k[s] / 3**0.5 for s in seen])
            weights[r, token] = np.exp(score).sum()
            sums[r, token] = np.exp(score) @ v[seen]
        heads.append(sums.sum(0) / weights.sum(0)[:, None])
    wanted = np.concatenate(heads, 1)[:11] @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)


def test_every_attention_of_the_repository_has_gradients():
    x = series(2, 24, 5)
    for name in ("flow", "hashed"):
        model = small(attention=name, depth=1)
        variables = filled(model)
        grads = jax.jit(jax.grad(lambda v, m=model: m.apply(v, x).sum()))(variables)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
