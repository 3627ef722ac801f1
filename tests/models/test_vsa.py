import re

import flax.linen as nn
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
from zoo.layers.position import relative_position_index
from zoo.layers.stochastic import DropPath
from zoo.layers.window import WindowAttention, window_merge, window_partition
from zoo.models.vision import vsa, vsa_swin
from zoo.models.vision.vsa import VariedSizeWindowAttention, sample_points, sample_windows


def numbers(*shape, key=0):
    return np.random.default_rng(key).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("module", [vsa, vsa_swin])
def test_shapes_are_those_of_the_docstring(module):
    name, table = documented_shapes(module.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_swin_says_that_it_is_not_verified():
    assert "not verified" in vsa_swin.__doc__.split("\n")[0]
    assert all(not v.params and not v.metric and not v.code for v in vsa_swin.VARIANTS.values())


# ------------------------------------------------------------------------------- windows


def bilinear(image, y, x):
    """One value of `[height, width, ...]` at a point, from the definition."""
    total = 0.0
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            weight = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
            total = total + weight * image[row, column]
    return total


def read(maps, offsets, scales, size, window):
    """What windows with these regressed numbers read from maps of `size`, completed with zeros."""
    return sample_windows(maps, *sample_points(offsets, scales, size, window))


def regressed(batch, rows, columns, heads, x=0.0, y=0.0):
    return np.broadcast_to(np.float32([x, y]), (batch, rows, columns, heads, 2))


def plain_windows(params, x, heads, w):
    """Attention in windows of a map completed with zeros behind the projection, in NumPy."""
    _, height, width, channels = x.shape
    rows, columns = -(-height // w) * w, -(-width // w) * w
    qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    qkv = np.pad(qkv, ((0, 0), (0, rows - height), (0, columns - width), (0, 0)))
    bias = np.asarray(params["relative_position_bias"])[relative_position_index((w, w))]
    out = []
    for window in np.asarray(window_partition(qkv, (w, w))):
        q, k, v = np.moveaxis(window.reshape(w * w, 3, heads, -1), 1, 0)
        scores = np.einsum("qnd,knd->nqk", q, k) * (channels // heads) ** -0.5
        weights = jax.nn.softmax(scores + np.moveaxis(bias, -1, 0))
        out.append(np.einsum("nqk,knd->qnd", weights, v).reshape(w * w, -1))
    out = window_merge(np.stack(out), (rows, columns), (w, w))[:, :height, :width]
    return out @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize(("size", "channels"), [((6, 9), 8), ((5, 7), 8), ((6, 6), 16)])
def test_windows_start_plain_with_zero_init(size, channels):
    """Also where the map is no whole number of windows, or is widened: the scale stays."""
    heads, w = 2, 3
    layer = VariedSizeWindowAttention(8, channels, heads, w, zero_init=True)
    x = numbers(2, *size, 8)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    for name in ("offsets", "scales"):
        assert not params[name]["kernel"].any() and not params[name]["bias"].any()
    for name in ("qkv", "out"):  # with a bias, padding before the projection would not be zeros
        params[name]["bias"] = numbers(*params[name]["bias"].shape, key=3)
    params["qkv"]["kernel"] *= 2
    params["relative_position_bias"] = numbers(25, heads)
    got = apply(layer, {"params": params}, x)
    assert_trees_close(got, plain_windows(params, x, heads, w), 1e-5)
    if size == (6, 9):  # and they are those of Swin's layer
        shared = {name: params[name] for name in ("qkv", "out", "relative_position_bias")}
        swin = WindowAttention(heads, (w, w))
        swin = apply(swin, {"params": shared}, window_partition(x, (w, w)))
        assert_trees_close(got, window_merge(swin, size, (w, w)), 1e-5)


def test_a_scale_of_one_doubles_the_window():
    w, maps = 3, numbers(1, 6, 9, 1, 2)
    got = read(maps, regressed(1, 2, 3, 1), regressed(1, 2, 3, 1, 1.0, 1.0), (6, 9), w)
    for m, n, i, j in np.ndindex(2, 3, w, w):
        y, x = m * w + 1 + 2 * (i - 1), n * w + 1 + 2 * (j - 1)
        wanted = bilinear(maps[0, :, :, 0], y, x)
        assert_trees_close(got[0, 0, m, n, i, j], wanted, 1e-5)


def test_points_between_pixels_are_bilinear_x_before_y_and_zeros_lie_outside():
    w, size, maps = 2, (3, 5), np.zeros((2, 4, 6, 2, 3), np.float32)
    maps[:, :3, :5] = numbers(2, 3, 5, 2, 3)
    offsets, scales = 0.4 * numbers(2, 2, 3, 2, 2, key=1), 0.7 * numbers(2, 2, 3, 2, 2, key=2)
    got = read(maps, offsets, scales, size, w)
    # as the paper states it: coordinates in [-1, 1] of the completed map, corners on pixels
    for b, h, m, n, i, j in np.ndindex(2, 2, 2, 3, w, w):
        point = []
        for axis, (index, step) in enumerate(((n, j), (m, i))):
            length = maps.shape[2 - axis]
            grid = np.linspace(-1, 1, length)
            centre = grid[index * w : (index + 1) * w].mean()
            shift = offsets[b, m, n, h, axis] / (size[1 - axis] // w)
            relative = (step - (w - 1) / 2) * 2 / (length - 1)
            at = centre + relative * (1 + scales[b, m, n, h, axis]) + shift
            point.append((at + 1) / 2 * (length - 1))
        wanted = bilinear(maps[b, :, :, h], point[1], point[0])
        assert_trees_close(got[b, h, m, n, i, j], wanted, 1e-5)


def test_one_window_to_the_right_is_the_neighbour():
    w, (height, width) = 3, (6, 9)
    maps = numbers(1, height, width, 1, 2)
    one = (width // w) * 2 * w / (width - 1)
    got = read(maps, regressed(1, 2, 3, 1, x=one), regressed(1, 2, 3, 1), (height, width), w)
    plain = read(maps, regressed(1, 2, 3, 1), regressed(1, 2, 3, 1), (height, width), w)
    assert_trees_close(got[:, :, :, :-1], plain[:, :, :, 1:], 1e-5)
    np.testing.assert_allclose(got[:, :, :, -1], 0, atol=1e-5)


def test_gradients_reach_what_is_regressed():
    """By finite differences in float64, of numbers that all windows of a head share."""
    with jax.enable_x64(True):
        maps = numbers(1, 6, 9, 2, 3).astype(np.float64)

        @jax.jit
        def loss(both):  # offsets and scales, [2, heads, (x, y)]
            offsets, scales = jnp.broadcast_to(both[:, None, None, None], (2, 1, 2, 3, 2, 2))
            return jnp.sum(jnp.sin(read(maps, offsets, scales, (5, 8), 3)))

        both, step = 0.3 * numbers(2, 2, 2, key=1).astype(np.float64), 1e-6
        grads = jax.jit(jax.grad(loss))(both)
        for index in np.ndindex(2, 2, 2):
            change = np.zeros((2, 2, 2))
            change[index] = step
            slope = (loss(both + change) - loss(both - change)) / (2 * step)
            np.testing.assert_allclose(grads[index], slope, rtol=1e-5, atol=1e-5)
        assert np.abs(grads).min() > 1e-3


def test_maps_smaller_than_a_window_are_refused():
    layer = VariedSizeWindowAttention(4, 4, 2, 7)
    with pytest.raises(ValueError, match=re.escape("not smaller than a 7x7 window; got 6x9")):
        layer.init(jax.random.key(0), jnp.zeros((1, 6, 9, 4)))


# -------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["vitaev2_vsa_test", "swin_vsa_test"])
def test_windows_need_not_tile_the_image(name):
    model = zoo.create(name, image_size=(32, 40))
    variables, x = filled(model), random_images(zoo.create(name, image_size=(32, 40)))
    features = apply(model, variables, x, method="features")
    assert features["stage1"].shape[1:3] == (8, 10)
    assert features["stage2"].shape[1:3] == (4, 5)
    with pytest.raises(ValueError, match="not \\(1, 32, 36, 3\\)"):
        model.init(jax.random.key(0), jnp.zeros((1, 32, 36, 3)))


def test_rates_of_a_stage_start_at_the_depth_of_the_stage_before():
    """The code slices the list of rates so; reductions have none."""
    model = zoo.create(
        "vitaev2_vsa_test", image_size=(24, 24), embed_dims=(8,) * 3, token_dims=(16,) * 3,
        ratios=(2,) * 3, sizes=(3,) * 3, dilations=((1,),) * 3, depths=(1, 1, 2),
        num_heads=(2,) * 3, reduction_heads=(2,) * 3, groups=(1,) * 3, reduction_groups=(1,) * 3,
        drop_path=0.3,
    )  # fmt: skip
    seen = {}

    def spy(call, args, kwargs, context):
        if isinstance(context.module, DropPath):
            seen.setdefault(context.module.path[:2], []).append(round(context.module.rate, 6))
        return call(*args, **kwargs)

    with nn.intercept_methods(spy):
        jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs().values())
    assert seen == {
        ("stages_0", "layers_0"): [0.0] * 3,
        ("stages_1", "layers_0"): [0.1] * 3,
        ("stages_2", "layers_0"): [0.1] * 3,
        ("stages_2", "layers_1"): [0.2] * 3,
    }


def test_the_skip_carries_the_convolution_only_if_asked():
    model = zoo.create("swin_vsa_test", depths=(1,), num_heads=(2,))
    variables, x = filled(model), random_images(model)
    block = variables["params"]["stages_0"]["layers_0"]
    block["attention"]["out"] = jax.tree.map(jnp.zeros_like, block["attention"]["out"])
    block["mlp"]["down"] = jax.tree.map(jnp.zeros_like, block["mlp"]["down"])
    without, carried = (
        apply(model.clone(position_in_skip=p), variables, x, method="features")
        for p in (False, True)
    )
    np.testing.assert_array_equal(without["stage1"], without["patch_embed"])
    assert np.abs(carried["stage1"] - carried["patch_embed"]).max() > 0.1
