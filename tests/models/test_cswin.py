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
from zoo.models.vision import cswin
from zoo.models.vision.cswin import StripeAttention


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(cswin.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def stripe_attention(stripe, qkv, heads=2):
    """The layer on a map, and its variables."""
    layer = StripeAttention(heads, stripe)
    variables = layer.init(jax.random.key(1), qkv)
    return layer, jax.tree.map(lambda p: p + 0.3, variables)


def random_qkv(height=6, width=8, channels=8):
    return jax.random.normal(jax.random.key(0), (2, height, width, 3 * channels))


def dense_attention(qkv, same_stripe, heads=2):
    """Softmax over the whole map, where only tokens of one stripe see each other."""
    tokens = np.asarray(qkv, np.float64).reshape(
        len(qkv), -1, 3, heads, qkv.shape[-1] // 3 // heads
    )
    query, key, value = np.moveaxis(tokens, 2, 0)
    scores = np.einsum("bqnd,bknd->bnqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores) * same_stripe
    out = np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), value)
    return out.reshape(*qkv.shape[:3], -1)


def local_position(value, kernel, bias, same_stripe):
    """The 3x3 depthwise convolution, one neighbour after the other, inside stripes only."""
    height, width = value.shape[1:3]
    same = same_stripe.reshape(height, width, height, width)
    out = np.broadcast_to(np.asarray(bias, np.float64), value.shape).copy()
    for row in range(height):
        for column in range(width):
            for i in range(max(row - 1, 0), min(row + 2, height)):
                for j in range(max(column - 1, 0), min(column + 2, width)):
                    if same[row, column, i, j]:
                        weight = kernel[i - row + 1, j - column + 1, 0]
                        out[:, row, column] += weight * value[:, i, j]
    return out


@pytest.mark.parametrize("stripe", [(0, 2), (2, 0), (0, 0)])
def test_stripes_are_dense_attention_and_convolution_with_a_mask(stripe):
    qkv = random_qkv()
    layer, variables = stripe_attention(stripe, qkv)
    rows, columns = np.indices((6, 8)).reshape(2, -1)
    block = rows // (stripe[0] or 6) * 100 + columns // (stripe[1] or 8)
    same = block[:, None] == block[None]
    position = variables["params"]["pos_conv"]
    value = np.asarray(qkv[..., 16:], np.float64)
    wanted = dense_attention(qkv, same) + local_position(value, **position, same_stripe=same)
    assert_trees_close(layer.apply(variables, qkv), wanted, 1e-5)


def test_the_order_of_stripes_changes_nothing_but_the_order_of_what_comes_out():
    qkv = random_qkv()
    layer, variables = stripe_attention((0, 2), qkv)

    def permuted(x):
        return x.reshape(2, 6, 4, 2, -1)[:, :, jnp.array([2, 0, 3, 1])].reshape(2, 6, 8, -1)

    got, wanted = layer.apply(variables, permuted(qkv)), permuted(layer.apply(variables, qkv))
    assert_trees_close(got, wanted, 1e-5)


def test_a_stripe_that_does_not_fit_sees_zeros_on_both_sides():
    qkv = random_qkv(height=5, width=5)
    layer, variables = stripe_attention((0, 4), qkv)
    padded = jnp.pad(qkv, ((0, 0), (0, 0), (1, 2), (0, 0)))  # 5 columns -> 8
    wanted = layer.apply(variables, padded)[:, :, 1:6]
    assert_trees_close(layer.apply(variables, qkv), wanted, 1e-5)


def test_stripes_as_wide_as_the_map_are_global_in_each_half_of_the_channels():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    layer = cswin.CrossAttention(num_heads=4, stripe_width=6)
    variables = jax.tree.map(lambda p: p * 4, layer.init(jax.random.key(1), x))
    p = variables["params"]
    qkv = x @ p["qkv"]["kernel"]
    halves = qkv.reshape(2, 6, 6, 3, 2, 4)
    everywhere = np.ones((36, 36), bool)
    out = []
    for i in range(2):
        half = halves[..., i, :].reshape(2, 6, 6, 12)
        position = local_position(
            half[..., 8:], **p[f"branch_{i}"]["pos_conv"], same_stripe=everywhere
        )
        out.append(dense_attention(half, everywhere) + position)
    wanted = np.concatenate(out, -1) @ p["out"]["kernel"]
    assert_trees_close(layer.apply(variables, x), wanted, 1e-4)


def test_images_of_any_size_give_a_pyramid_of_strides_4_to_32():
    model = zoo.create("cswin_test")
    variables = filled(model)
    images = jax.random.normal(jax.random.key(0), (1, 75, 50, 3))
    out = apply(model, variables, images, method="features")
    sizes = [out[f"stage{i}"].shape[1:3] for i in range(1, 5)]
    assert sizes == [(19, 12), (10, 6), (5, 3), (3, 2)]
    assert np.isfinite(out["logits"]).all()


def test_weights_depend_on_the_resolution_only_by_where_a_stripe_is_the_map():
    small = zoo.create("cswin_test", image_size=64)
    state = zoo.export(small, filled(small))
    large = zoo.create("cswin_test", image_size=96)
    assert np.isfinite(apply(large, zoo.convert(large, state), random_images(large, 1))).all()
    with pytest.raises(
        ValueError, match=r"stage3.0.attns.0.get_v.weight has shape \(48, 1, 3, 3\)"
    ):
        zoo.convert(zoo.create("cswin_test"), state)  # its third stage has maps of 2x2


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((1, 4, 4, 6))
    with pytest.raises(ValueError, match="num_heads=3 does not fit 6 channels in 2 branches"):
        cswin.CrossAttention(num_heads=3, stripe_width=2).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="takes images of shape"):
        zoo.create("cswin_test").init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
