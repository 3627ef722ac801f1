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
    filled_state_dict,
)

import zoo
from zoo.layers.position import relative_position_index
from zoo.models.video import video_swin


@pytest.fixture(scope="module")
def small():
    model = zoo.create("video_swin_test")
    return model, filled(model)


def clips(model, batch=2, size=None, key=0):
    shape = (batch, *(size or model.clip_size), model.in_channels)
    return jax.random.normal(jax.random.key(key), shape)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(video_swin.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_windows_and_shifts_are_fitted_axis_by_axis():
    fit = video_swin.fit_window
    assert fit((16, 14, 14), (8, 7, 7), True) == ((8, 7, 7), (4, 3, 3))
    assert fit((16, 7, 14), (8, 7, 7), True) == ((8, 7, 7), (4, 0, 3))
    assert fit((4, 5, 14), (8, 7, 7), True) == ((4, 5, 7), (0, 0, 3))
    assert fit((16, 14, 14), (8, 7, 7), False) == ((8, 7, 7), (0, 0, 0))


def test_the_position_index_counts_time_then_rows_then_columns():
    index = relative_position_index((2, 3, 4))
    at = np.array([(t, y, x) for t in range(2) for y in range(3) for x in range(4)])
    t, y, x = np.moveaxis(at[:, None] - at[None], -1, 0)
    np.testing.assert_array_equal(index, ((t + 1) * 5 + y + 2) * 7 + x + 3)


def image_swin(model):
    """A 2-D Swin of the same widths, its official state dict, and that dict inflated."""
    side = model.clip_size[1]
    flat = zoo.create(
        "swin_test", image_size=side, patch_size=model.patch_size[1], embed_dim=model.embed_dim,
        depths=model.depths, num_heads=model.num_heads, window_size=model.window_size[1],
        num_classes=model.num_classes,
    )  # fmt: skip
    state = filled_state_dict(flat)
    return flat, state, video_swin.inflate(state, model)


def without_head(state, model):
    """The state dict with a zero head, which has to be there."""
    shapes = {"weight": (model.num_classes, 2 * model.embed_dim), "bias": (model.num_classes,)}
    return state | {f"cls_head.fc_cls.{k}": np.zeros(s, np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("frames", [2, 8])
def test_a_clip_of_equal_frames_gives_the_maps_of_the_image(frames):
    """Softmax over copies of the same keys, each with the same bias, is softmax over one copy."""
    model = zoo.create("video_swin_test", window_size=(8, 4, 4), clip_size=(frames, 32, 32))
    flat, state, inflated = image_swin(model)
    variables = zoo.convert(model, without_head(inflated, model))
    image = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    clip = jnp.repeat(image[:, None], frames, 1)
    still = apply(flat, zoo.convert(flat, state), image, method="features")
    moving = apply(model, variables, clip, method="features")
    for name in ("patch_embed", "stage1", "stage2", "norm"):
        for frame in np.moveaxis(np.asarray(moving[name]), 1, 0):
            assert_trees_close(frame, np.asarray(still[name]), 1e-5)


def test_windows_of_one_frame_are_those_of_the_image():
    """With a window of one frame and patches of one, frames do not see each other at all."""
    model = zoo.create("video_swin_test", window_size=(1, 4, 4), patch_size=(1, 4, 4))
    flat, state, inflated = image_swin(model)
    variables = zoo.convert(model, without_head(inflated, model))
    clip = clips(model, 1, (3, 32, 32))
    still = apply(flat, zoo.convert(flat, state), clip[0], method="features")
    moving = apply(model, variables, clip, method="features")
    for name in ("stage1", "norm"):
        assert_trees_close(np.asarray(moving[name][0]), np.asarray(still[name]), 1e-5)


def test_inflation_resizes_tables_and_starts_a_fresh_head():
    model = zoo.create("video_swin_test", window_size=(2, 7, 7))
    _, state, inflated = image_swin(zoo.create("video_swin_test"))
    inflated = video_swin.inflate(state, model)
    table = inflated["backbone.layers.0.blocks.0.attn.relative_position_bias_table"]
    assert table.shape == (3 * 13 * 13, 2)
    variables = zoo.convert(model, inflated, adapt=True)
    direct = zoo.convert(model, state, adapt=True)  # the image model's own file
    trunk, same = (
        {k: v for k, v in x["params"].items() if k != "head"} for x in (direct, variables)
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), trunk, same))
    assert np.isfinite(apply(model, variables, clips(model))).all()


@pytest.mark.parametrize("size", [(5, 30, 18), (1, 17, 40), (11, 8, 8)])
def test_clips_of_any_size_are_taken(small, size):
    model, variables = small
    out = apply(model, variables, clips(model, 1, size), method="features")
    time, rows, columns = (-(-s // p) for s, p in zip(size, model.patch_size, strict=True))
    assert out["stage1"].shape == (1, time, rows, columns, model.embed_dim)
    merged = (1, time, -(-rows // 2), -(-columns // 2), 2 * model.embed_dim)
    assert out["stage2"].shape == merged
    assert np.isfinite(out["logits"]).all()


def test_recomputing_blocks_changes_nothing(small):
    model, variables = small
    x = clips(model, 1)
    assert_trees_close(
        apply(model.clone(remat=True), variables, x), apply(model, variables, x), 1e-6
    )


def test_images_are_refused_with_what_is_wanted(small):
    model, variables = small
    with pytest.raises(ValueError, match=r"clips of shape \(batch, frames, height, width, 3\)"):
        model.apply(variables, jnp.zeros((2, 32, 32, 3)))
