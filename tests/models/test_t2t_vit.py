import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    apply,
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    random_images,
)

import zoo
from zoo.layers.position import sinusoids
from zoo.models.vision import t2t_vit
from zoo.training.groups import decays


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(t2t_vit.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: v for k, v in shapes.items() if not k.startswith("block") or k == "block0"} == table


def test_sinusoids_are_the_published_ones():
    table = sinusoids(3, 256)
    np.testing.assert_array_equal(table[0, :4], [0, 1, 0, 1])
    np.testing.assert_allclose(table[1, :3], [0.841471, 0.540302, 0.801962], atol=1e-6)
    np.testing.assert_allclose(table[2, 1], np.cos(2), atol=1e-6)
    row = [np.sin(5), np.cos(5), np.sin(0.05), np.cos(0.05)]
    np.testing.assert_allclose(sinusoids(6, 4)[5], row, atol=1e-6)
    np.testing.assert_allclose(sinusoids(6, 3, np.float32)[5, :2], row[:2], atol=1e-6)


@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 4, 2), (3, 2, 1)])
def test_patches_overlap_and_are_channel_major(size, stride, padding):
    x = np.random.default_rng(0).normal(size=(2, 12, 8, 3)).astype(np.float32)
    got = t2t_vit.unfold(x, size, stride, padding)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for row in range(got.shape[1]):
        for column in range(got.shape[2]):
            top, left = row * stride, column * stride
            patch = padded[:, top : top + size, left : left + size]
            wanted = patch.transpose(0, 3, 1, 2).reshape(2, -1)
            np.testing.assert_allclose(got[:, row, column], wanted, rtol=1e-6)


def tokens(length=20, width=8, scale=0.5):
    rng = np.random.default_rng(0)
    return (scale * rng.normal(size=(3, 2, length, width))).astype(np.float32)


def test_linear_time_attention_is_the_kernel_matrix_row_normalised():
    q, k, v = tokens()
    w = t2t_vit.orthogonal_features(jax.random.key(0), (4, 8), jnp.float32)
    assert_trees_close(w @ w.T, 4 * np.eye(4), 1e-5)
    got = t2t_vit.performer_attention(q, k, v, w)
    phi = lambda x: np.asarray(t2t_vit.random_features(x, w), np.float64)  # noqa: E731
    kernel = np.einsum("bqm,bkm->bqk", phi(q), phi(k))
    wanted = kernel @ v / (kernel.sum(-1, keepdims=True) + 1e-8)
    assert_trees_close(got, wanted, 1e-5)


def test_more_features_come_nearer_to_softmax():
    q, k, v = tokens(scale=0.25)  # exponentials of larger inputs have too heavy tails
    exact = jax.nn.softmax(np.einsum("bqc,bkc->bqk", q, k), -1) @ v

    def error(count):
        """The mean over 32 draws of the features."""
        w = jax.random.normal(jax.random.key(0), (32, count, 8))
        got = jax.vmap(t2t_vit.performer_attention, (None, None, None, 0))(q, k, v, w)
        return float(jnp.abs(got - exact).mean())

    assert error(256) == pytest.approx(4 * error(4096), rel=0.15)


def test_softmax_layers_scale_by_the_width_that_comes_in():
    layer = t2t_vit.TokenLayer(8, performer=False)
    x = jax.random.normal(jax.random.key(0), (2, 6, 30))
    variables = jax.tree.map(lambda p: 20 * p, layer.init(jax.random.key(1), x))
    p = variables["params"]
    norm = lambda x, p: (  # noqa: E731
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"]
    )
    q, k, v = jnp.split(norm(x, p["norm1"]) @ p["qkv"]["kernel"], 3, -1)
    y = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) * 30**-0.5, -1) @ v
    z = v + y @ p["out"]["kernel"]
    h = norm(z, p["norm2"]) @ p["mlp"]["up"]["kernel"]
    wanted = z + jax.nn.gelu(h, approximate=False) @ p["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(layer.apply(variables, x), wanted, rtol=2e-4, atol=2e-3)


def test_frozen_parameters_have_no_gradient_and_no_decay():
    model = zoo.create("t2t_vit_test")
    variables = filled(model)
    loss = lambda v: model.apply(v, random_images(model)).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables)["params"]
    mask = decays(grads, model)
    assert not np.any(grads["position_embedding"]) and not mask["position_embedding"]
    assert not np.any(grads["tokens_1"]["random_features"])
    assert zoo.registry.system(model).is_frozen("tokens_1/random_features")
    assert np.any(grads["tokens_1"]["key"]["kernel"]) and mask["tokens_1"]["key"]["kernel"]


def test_other_image_sizes_resize_the_sinusoids_of_patches():
    small = zoo.create("t2t_vit_test")
    state = zoo.export(small, filled(small))
    model = zoo.create("t2t_vit_test", image_size=(96, 64))
    variables = zoo.convert(model, state, adapt=True)
    table = variables["params"]["position_embedding"]
    assert table.shape == (1, 25, 48)
    np.testing.assert_array_equal(table[0, 0], state["pos_embed"][0, 0])
    assert np.isfinite(apply(model, variables, random_images(model))).all()


def test_sizes_that_do_not_fit_are_refused():
    model = zoo.create("t2t_vit_test", image_size=(40, 64))
    with pytest.raises(ValueError, match=r"image_size=\(40, 64\) is no multiple of 16"):
        model.init(jax.random.key(0), jnp.zeros((1, 40, 64, 3)))
