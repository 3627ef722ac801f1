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
    gradient,
)

import zoo
from zoo.models.imaging import hat


@pytest.fixture(scope="module")
def small():
    """One group with a shifted block, and weights of unit scale."""
    model = zoo.create("hat_test")
    return model, filled(model)


def images(height, width, batch=1, channels=3, key=0):
    return jax.random.uniform(jax.random.key(key), (batch, height, width, channels))


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(hat.__doc__)
    assert feature_shapes(zoo.create(name)) == table


# -------------------------------------------------------------------- overlapping windows


@pytest.mark.parametrize("window, overlap", [(16, 8), (8, 4), (7, 2), (4, 4), (5, 0)])
def test_the_position_index_has_one_row_for_each_offset(window, overlap):
    """Pairs of one offset share a row, other pairs another, and no row is left over."""
    index = hat.overlapping_position_index(window, overlap)
    rows = (2 * window + overlap - 1) ** 2
    assert (index < rows).all() and (index >= -rows).all()
    wide = window + overlap
    query = np.array([(y, x) for y in range(window) for x in range(window)])
    key = np.array([(y, x) for y in range(wide) for x in range(wide)])
    offset = (key[None] - query[:, None]).reshape(-1, 2)
    pairs = {(*o, i) for o, i in zip(offset.tolist(), (index % rows).ravel(), strict=True)}
    assert len(pairs) == len({p[:2] for p in pairs}) == len({p[2] for p in pairs}) == rows


@pytest.mark.parametrize("size", [(8, 12), (4, 4)])
def test_overlapping_windows_equal_dense_attention_with_zeros_around_the_image(size):
    """In float64, one query at a time, from the definition."""
    window, overlap, heads, channels = 4, 2, 2, 6
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1, *size, channels))
        block = hat.OverlappingBlock(
            heads, window, overlap, dtype=jnp.float64, param_dtype=jnp.float64
        )
        variables = block.init(jax.random.key(0), x)
        variables = jax.tree.map(lambda p: rng.normal(size=p.shape), variables)
        p = variables["params"]
        p["mlp"] = jax.tree.map(np.zeros_like, p["mlp"])
        ours = np.asarray(block.apply(variables, x) - x)[0]
    u = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    u = u * p["norm1"]["scale"] + p["norm1"]["bias"]
    qkv = (u @ p["qkv"]["kernel"] + p["qkv"]["bias"])[0]
    around = np.pad(qkv, ((1, 1), (1, 1), (0, 0)))
    side, d = 2 * window + overlap - 1, channels // heads
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i // window * window, j // window * window
            keys = around[top : top + 6, left : left + 6].reshape(36, -1)
            rows = np.arange(6)[:, None] - i % window - overlap + 1
            columns = np.arange(6)[None] - j % window - overlap + 1
            bias = p["relative_position_bias"][(rows * side + columns) % side**2].reshape(36, heads)
            parts = []
            for n in range(heads):
                at = slice(n * d, (n + 1) * d)
                key, value = (keys[:, c * channels :][:, at] for c in (1, 2))
                scores = key @ qkv[i, j, at] / np.sqrt(d) + bias[:, n]
                weights = np.exp(scores - scores.max())
                parts.append(weights / weights.sum() @ value)
            out = np.concatenate(parts) @ p["out"]["kernel"] + p["out"]["bias"]
            np.testing.assert_allclose(ours[i, j], out, rtol=0, atol=1e-10 * np.abs(out).max())


def test_an_overlap_that_has_no_middle_is_refused():
    assert hat.overlap_of(16, 0.5) == 8
    with pytest.raises(ValueError, match=r"overlap_ratio=0\.5 makes 3 more rows"):
        hat.overlap_of(7, 0.5)


# ------------------------------------------------------------------------- hybrid blocks


def test_windows_alone_commute_with_moving_the_map_by_a_window():
    block = hat.HybridBlock(2, 4, shifted=False, squeeze_factor=4, conv_scale=0.0)
    x = jax.random.normal(jax.random.key(0), (1, 12, 8, 12))
    variables = jax.jit(block.init)(jax.random.key(1), x)
    moved = apply(block, variables, jnp.roll(x, (4, -4), (1, 2)))
    assert_trees_close(moved, np.roll(apply(block, variables, x), (4, -4), (1, 2)), 1e-5)


def test_channel_attention_brings_news_from_far_away():
    """Beside windows, a pixel moves every other one through the mean; without, its own window."""
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 8))
    reach = []
    for weight in (0.0, 1.0):
        block = hat.HybridBlock(2, 4, shifted=False, squeeze_factor=2, conv_scale=weight)
        variables = jax.jit(block.init)(jax.random.key(1), x)
        before, after = (apply(block, variables, y) for y in (x, x.at[0, 0, 0, 0].add(1.0)))
        reach.append((np.abs(after - before).max(-1) > 0).sum())
    assert reach == [16, 256]


def test_blocks_of_one_window_are_not_shifted():
    """The official code decides by the training size, whatever comes later."""
    x = images(8, 8)
    still = zoo.create("hat_test", image_size=4)
    moving = zoo.create("hat_test", image_size=8)
    variables = filled(still)
    assert np.abs(apply(still, variables, x) - apply(moving, variables, x)).max() > 1e-3


# ------------------------------------------------------------------------------- the model


def test_pixels_are_shuffled_as_in_pytorch():
    x = jnp.arange(2 * 3 * 8.0).reshape(1, 2, 3, 8)
    y = hat.pixel_shuffle(x, 2)
    assert y.shape == (1, 4, 6, 2)
    for c in range(2):
        for i in range(2):
            for j in range(2):
                np.testing.assert_array_equal(y[0, i::2, j::2, c], x[0, :, :, c * 4 + i * 2 + j])


@pytest.mark.parametrize("upscale", [1, 2, 3, 4, 8])
def test_images_of_any_size_are_reflected_to_whole_windows_and_cropped(upscale):
    model = zoo.create("hat_test", upscale=upscale, depths=(1,))
    variables = filled(model)
    x = images(13, 10)
    padded = jnp.pad(x, ((0, 0), (0, 3), (0, 2), (0, 0)), mode="reflect")
    ours, whole = apply(model, variables, x), apply(model, variables, padded)
    assert ours.shape == (1, 13 * upscale, 10 * upscale, 3)
    assert_trees_close(ours, np.asarray(whole[:, : 13 * upscale, : 10 * upscale]), 1e-5)


def test_the_range_of_pixels_moves_the_mean_only_through_the_network(small):
    """With a zero last layer the output is the training mean, in any range."""
    model, variables = small
    zero = jax.tree.map(jnp.zeros_like, variables["params"]["conv_last"])
    variables = {"params": variables["params"] | {"conv_last": zero}}
    for pixels in (1.0, 255.0):
        out = apply(model.clone(range=pixels), variables, images(8, 8))
        np.testing.assert_allclose(out, np.broadcast_to(np.float32(hat.RGB_MEAN), out.shape))


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing(small):
    model, variables = small
    x = images(8, 8)
    assert_trees_close(
        gradient(model.clone(remat=True), variables, x), gradient(model, variables, x), 1e-5
    )


def test_a_table_of_positions_is_resized_when_asked():
    small = zoo.create("hat_test", absolute_position=True)
    state = zoo.export(small, filled(small))
    large = small.clone(image_size=(24, 16))
    table = zoo.convert(large, state, adapt=True)["params"]["position_embedding"]
    assert table.shape == (1, 24 * 16, 16)
    with pytest.raises(ValueError, match="a learned position for each pixel of 24x16"):
        large.init(jax.random.key(0), images(16, 16))


def test_what_cannot_be_built_is_said_in_a_sentence():
    x = images(8, 8)
    for fields, message in (
        ({"upscale": 5}, "upscale=5 is neither 3 nor a power of two"),
        ({"image_size": 2}, "is smaller than a window of 4"),
        ({"squeeze_factor": 30}, "leave no channel of 16"),
        ({"in_channels": 1}, r"images of shape \(batch, height, width, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(zoo.create("hat_test", **fields).init, jax.random.key(0), x)


@pytest.mark.parametrize("name, what", [("hat_test", "images"), ("predformer_test", "frames")])
def test_bytes_are_refused(name, what):
    model = zoo.create(name)
    pixels = np.zeros(model.example_inputs(1)[what].shape, np.uint8)
    with pytest.raises(ValueError, match=f"takes {what} of floats from 0 to 1, not uint8; divide"):
        model.init(jax.random.key(0), pixels)
