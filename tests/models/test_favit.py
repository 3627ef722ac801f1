import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import apply, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.vision import favit
from zoo.models.vision.favit import FactorizedAttention, Group, pool_windows


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(favit.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_pooling_runs_over_consecutive_numbers_and_not_over_windows():
    """Two windows of three channels, 0 1 2 and 3 4 5 everywhere."""
    x = jnp.broadcast_to(jnp.arange(6.0).reshape(1, 1, 2, 1, 3), (1, 7, 2, 7, 3))
    got = pool_windows(x.reshape(1, 7, 14, 3), num_heads=1, dilation=1)
    np.testing.assert_allclose(got, np.broadcast_to([0.5, 2.5, 4.5], (1, 49, 1, 3)))


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_token_is_pooled_from_its_position_in_every_window(dilation):
    extent = 6 * dilation + 1
    size, heads = (2 * extent - 3, extent + 1), 2
    x = np.random.default_rng(0).normal(size=(2, *size, 6)).astype(np.float32)
    got = pool_windows(x, heads, dilation)
    assert got.shape == (2, 49, heads, 3)
    mirrored = np.pad(x, ((0, 0), (0, 3), (0, extent - 1), (0, 0)), "reflect")
    for row, column in ((0, 0), (2, 5), (6, 6)):
        at = mirrored[:, row * dilation :: extent, column * dilation :: extent]
        assert at.shape[1:3] == (2, 2)  # four windows
        for head in range(heads):
            numbers = at[..., 3 * head : 3 * head + 3].reshape(2, 3, 4)
            np.testing.assert_allclose(
                got[:, 7 * row + column, head], numbers.mean(-1), rtol=1e-5, atol=1e-6
            )


def test_a_group_is_softmax_over_its_tokens_with_convolved_values():
    layer = Group(num_heads=2, bias=True, mix=True)
    rng = np.random.default_rng(0)
    query, tokens = rng.normal(size=(2, 4, 5, 2, 3)), rng.normal(size=(2, 7, 7, 2, 3))
    variables = layer.init(jax.random.key(0), query, tokens)
    variables = jax.tree.map(lambda p: p + rng.normal(size=p.shape) / 2, variables)
    got = layer.apply(variables, query, tokens)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    mixed = dense("mix", tokens)
    key, value = dense("key", mixed), dense("value", mixed)
    padded = np.pad(value.reshape(2, 7, 7, 6), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = p["pos_conv"]["kernel"]
    convolved = sum(
        kernel[i, j, 0] * padded[:, i : i + 7, j : j + 7] for i in range(3) for j in range(3)
    )
    value = value + (convolved + p["pos_conv"]["bias"]).reshape(value.shape)
    scores = np.einsum("bhwnd,bijnd->bnhwij", query, key).reshape(2, 2, 4, 5, 49) / np.sqrt(3)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = np.einsum("bnhwk,bknd->bhwnd", weights, value.reshape(2, 49, 2, 3))
    np.testing.assert_allclose(got, wanted.reshape(2, 4, 5, 6), rtol=1e-4, atol=1e-4)


def test_every_token_sees_the_whole_map():
    """The gradient of one token reaches all pixels, unlike that of a window."""
    layer = FactorizedAttention(num_heads=1, sr_ratio=1)

    @jax.jit
    def gradient(x):
        variables = layer.init(jax.random.key(1), x)
        return jax.grad(lambda x: layer.apply(variables, x)[0, 3, 3].sum())(x)

    grad = gradient(jax.random.normal(jax.random.key(0), (1, 14, 14, 8)))
    assert (jnp.abs(grad).max(-1) > 0).all()


def test_the_cost_grows_with_the_map_and_not_with_its_square():
    """No product of scores has more than 49 keys, or the map over r^2."""
    layer = FactorizedAttention(num_heads=1, sr_ratio=8)
    x = jnp.zeros((1, 56, 56, 32))
    call = jax.jit(lambda x: layer.init_with_output(jax.random.key(0), x)[0])
    text = call.lower(x).as_text()
    assert "3136x49x" in text and "3136x3136x" not in text


def test_images_that_are_not_square_or_whole_windows_give_a_pyramid():
    model = zoo.create("favit_test")
    images = jax.random.normal(jax.random.key(0), (1, 90, 67, 3))
    out = apply(model, filled(model), images, method="features")
    assert [out[f"stage{i}"].shape[1:3] for i in (1, 2, 3)] == [(23, 17), (12, 9), (6, 5)]
    assert np.isfinite(out["logits"]).all()


def test_images_that_would_be_mirrored_twice_are_refused():
    model = zoo.create("favit_b0")
    shape = lambda side: jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)  # noqa: E731
    key = jax.random.key(0)
    assert jax.eval_shape(model.init_with_output, key, shape(97))[0].shape == (1, 1000)
    with pytest.raises(ValueError, match="24x24 is too small for windows of 49x49"):
        jax.eval_shape(model.init, key, shape(96))


def test_channels_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match=r"40 channels in 2 heads cannot be shared out as \(2, 7"):
        FactorizedAttention(2, 2).init(jax.random.key(0), jnp.zeros((1, 14, 14, 40)))
