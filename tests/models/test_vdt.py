import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.inference.diffusion import Diffusion, add_noise
from zoo.models.video import vdt
from zoo.models.video.vdt import MASKS, fixed_tables, frame_mask, given_and_noisy


@pytest.fixture(scope="module")
def small():
    model = zoo.create("vdt_test")
    return model, with_tables(model, filled(model))


def with_tables(model, variables):
    tables = {name: jnp.asarray(t) for name, t in fixed_tables(model).items()}
    return {"params": variables["params"] | tables}


def inputs(model, batch=2, key=0):
    shape = model.example_inputs(batch)["latents"].shape
    return jax.random.normal(jax.random.key(key), shape), jnp.arange(1.0, batch + 1) * 100


def run(model, variables, x, t, **kwargs):
    return jax.jit(lambda v, x, t: model.apply(v, x, t, **kwargs))(variables, x, t)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(vdt.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_at_initialisation_nothing_comes_out():
    model = zoo.create("vdt_test")
    x, t = inputs(model)
    variables = jax.jit(model.init)(jax.random.key(0), x, t)
    assert not np.any(run(model, variables, x, t))


def test_frames_see_each_other_only_through_attention_over_time(small):
    """With its projection at zero, a frame's prediction is its own affair."""
    model, variables = small
    x, t = inputs(model)
    moved = x.at[:, 1].add(1.0)
    first, second = (run(model, variables, y, t) for y in (x, moved))
    assert np.abs(first - second)[:, 0].max() > 1e-3
    layer = variables["params"]["layers_0"]
    cut = layer | {"temporal_proj": jax.tree.map(jnp.zeros_like, layer["temporal_proj"])}
    apart = {"params": variables["params"] | {"layers_0": cut}}
    first, second = (run(model, apart, y, t) for y in (x, moved))
    np.testing.assert_array_equal(first[:, [0, 2]], second[:, [0, 2]])
    assert np.abs(first - second)[:, 1].max() > 1e-3


def test_a_video_model_of_one_frame_without_time_is_the_image_model():
    video = zoo.create("vdt_test", clip_size=(1, 4, 4))
    image = video.clone(temporal=False)
    variables = with_tables(video, filled(video))
    params = dict(variables["params"])
    layer = dict(params["layers_0"])
    layer["temporal_proj"] = jax.tree.map(jnp.zeros_like, layer["temporal_proj"])
    params["frame_position_embedding"] = jnp.zeros_like(params["frame_position_embedding"])
    x, t = inputs(video)
    ours = run(video, {"params": params | {"layers_0": layer}}, x, t)
    for name in ("frame_position_embedding",):
        del params[name]
    params["layers_0"] = {k: v for k, v in layer.items() if not k.startswith("temporal")}
    assert_trees_close(ours, np.asarray(run(image, {"params": params}, x, t)), 1e-5)


def test_positions_say_column_then_row():
    """Half the channels for the column, half for the row; in each, sines before cosines."""
    model = zoo.create("vdt_test", clip_size=(2, 4, 8))
    table = fixed_tables(model)["position_embedding"][0].reshape(2, 4, 16)
    rates = 10000.0 ** (-np.arange(4) / 4)
    for row in range(2):
        for column in range(4):
            parts = [f(at * rates) for at in (column, row) for f in (np.sin, np.cos)]
            np.testing.assert_allclose(table[row, column], np.concatenate(parts), atol=1e-6)


def test_dropped_labels_have_a_row_of_their_own():
    model = zoo.create("vdt_test", class_dropout=0.5, num_classes=3)
    variables = with_tables(model, filled(model))
    assert variables["params"]["label_embedding"].shape == (4, 16)
    x, _ = inputs(model, 1)
    x, t = jnp.repeat(x, 32, 0), jnp.full(32, 10.0)
    out = run(model, variables, x, t, train=True, rngs={"dropout": jax.random.key(0)})
    assert len({row.tobytes() for row in np.asarray(out).round(4)}) == 2


# ---------------------------------------------------------------------------------- masks


def test_masks_of_frames():
    rng = np.random.default_rng(0)
    made = {k: frame_mask(k, (16, 2, 2), rng)[:, 0, 0] for k in MASKS[:6]}
    assert made["predict"].tolist() == [0] * 8 + [1] * 8
    assert made["backward"].tolist() == [1] * 8 + [0] * 8
    assert made["interpolate"].tolist() == [0, 1, 1, 1] * 4
    assert made["unconditional"].all() and made["one_frame"].sum() == 15
    many = [frame_mask("random_frames", (16, 1, 1), rng).mean() for _ in range(200)]
    assert abs(np.mean(many) - 0.8) < 5 * 0.4 / np.sqrt(3200)
    with pytest.raises(ValueError, match="A mask is one of predict"):
        frame_mask("forward", (4, 2, 2), rng)


def test_completion_hides_the_same_half_in_a_run_of_frames():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = frame_mask("complete", (12, 8, 8), rng)
        inside = mask.reshape(12, -1).any(-1)
        first, last = np.nonzero(inside)[0][[0, -1]]
        assert first <= 3 and last >= 8 and inside[first : last + 1].all()
        np.testing.assert_array_equal(
            mask[inside], np.broadcast_to(mask[first], mask[inside].shape)
        )
        assert 0.2 < mask[first].mean() <= 0.5


def test_given_places_are_clean_and_carry_no_error(small):
    model, variables = small
    x0, t = inputs(model)
    noise = jax.random.normal(jax.random.key(5), x0.shape)
    level, _ = Diffusion().at(t.astype(int))
    x = add_noise(x0, noise, level)
    mask = np.zeros(x0.shape[:4], np.float32)
    mask[:, 1:] = 1
    seen = given_and_noisy(x0, x, mask)
    np.testing.assert_array_equal(seen[:, 0], x0[:, 0])
    np.testing.assert_array_equal(seen[:, 1:], x[:, 1:])
    other = given_and_noisy(x0, x.at[:, 0].add(1.0), mask)
    np.testing.assert_array_equal(run(model, variables, seen, t), run(model, variables, other, t))


def test_what_cannot_be_built_is_said_in_a_sentence(small):
    model, variables = small
    x, t = inputs(model)
    with pytest.raises(ValueError, match=r"latents of shape \(batch, 3, 4, 4, 2\)"):
        model.apply(variables, x[:, :2], t)
    with pytest.raises(ValueError, match="a clip is one frame, not 3"):
        model.clone(temporal=False).apply(variables, x, t)
