import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_helpers import assert_trees_close, feature_shapes, filled

import zoo
from zoo.inference import Euler, Flow, sample
from zoo.methods import Int8
from zoo.models.video.magic_1_for_1 import extend, rotate, rotations


@pytest.fixture(scope="module")
def small():
    model = zoo.create("magic_1_for_1_test")
    return model, filled(model)


def inputs(model, batch=2, key=0, **changed):
    specs = model.example_inputs(batch)
    keys = jax.random.split(jax.random.key(key), len(specs))
    made = {n: jax.random.normal(k, s.shape) for k, (n, s) in zip(keys, specs.items(), strict=True)}
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])[:batch]
    return made | {"text_mask": mask, "times": jnp.array([100.0, 900.0])[:batch]} | changed


def run(model, variables, given, **kwargs):
    return jax.jit(lambda v, x: model.apply(v, **x, **kwargs))(variables, given)


def test_shapes_are_those_of_the_docstring():
    shapes = feature_shapes(zoo.create("magic_1_for_1_small"))
    assert shapes == {
        "image_tokens": (2048, 192),
        "text_tokens": (77, 192),
        "prediction": (8, 32, 32, 16),
    }


def test_at_initialisation_nothing_comes_out():
    model = zoo.create("magic_1_for_1_test")
    given = inputs(model)
    variables = jax.jit(model.init)(jax.random.key(0), **given)
    assert not np.any(run(model, variables, given))


def test_padded_text_reaches_neither_image_nor_text(small):
    model, variables = small
    given = inputs(model)
    other = given | {"text": given["text"].at[:, 2].add(5.0)}
    first, second = (run(model, variables, g, method="features") for g in (given, other))
    np.testing.assert_array_equal(first["prediction"], second["prediction"])
    np.testing.assert_array_equal(first["text_tokens"][:, :1], second["text_tokens"][:, :1])
    assert np.abs(first["text_tokens"][:, 2] - second["text_tokens"][:, 2]).max() > 0


def test_padding_can_be_left_out(small):
    model, variables = small
    given = inputs(model, 1)
    short = given | {k: given[k][:, :2] for k in ("text", "text_mask")}
    assert_trees_close(run(model, variables, given), np.asarray(run(model, variables, short)), 1e-5)


def test_given_frames_are_marked(small):
    """No frame, one frame of zeros and two frames of zeros are three different conditions."""
    model, variables = small
    given = inputs(model)
    outs = [run(model, variables, given | {"given": jnp.zeros((2, n, 4, 4, 2))}) for n in (0, 1, 2)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(outs))


def test_rotary_scores_depend_on_the_offset_alone():
    """On each axis: queries and keys of equal content, moved together, keep their score."""
    size, dims = (3, 4, 5), (4, 4, 4)
    turn = rotations(size, dims, 256.0)
    query, key = (jnp.tile(v, (1, 60, 1, 1)) for v in jax.random.normal(jax.random.key(0), (2, 12)))
    scores = np.einsum("bqnd,bknd->qk", rotate(query, turn), rotate(key, turn))
    scores = scores.reshape(*size, *size)
    np.testing.assert_allclose(scores[:2, :3, :4, :2, :3, :4], scores[1:, 1:, 1:, 1:, 1:, 1:],
                               atol=1e-4)  # fmt: skip
    tail = rotate(jnp.ones((1, 61, 1, 12)), turn)[:, 60]
    np.testing.assert_array_equal(tail, 1.0)


def test_one_step_along_the_true_velocity_returns_the_clip(small):
    model, _ = small
    x0 = inputs(model)["latents"]
    noise = jax.random.normal(jax.random.key(9), x0.shape)
    x = sample(lambda x, t: noise - x0, x0.shape, schedule=Flow(1, shift=5.0), solver=Euler(),
               rng=jax.random.key(0), start=noise)  # fmt: skip
    np.testing.assert_allclose(x, x0, atol=1e-6)


def test_windows_make_a_long_video():
    """Three windows of 8 that share a frame are 22 frames, and each begins where one ended."""

    def window(given, rng):
        rest = jax.random.normal(rng, (1, 7, 2, 2, 1))
        return jnp.concatenate([given, given[:, -1:] + jnp.cumsum(rest, 1)], 1)

    first = jnp.full((1, 1, 2, 2, 1), 5.0)
    long = jax.jit(lambda f: extend(window, f, jax.random.key(0), 3))(first)
    assert long.shape == (1, 22, 2, 2, 1)
    np.testing.assert_array_equal(long[:, :1], first)
    one = jax.jit(window)(long[:, 7:8], jax.random.fold_in(jax.random.key(0), 1))
    np.testing.assert_allclose(long[:, 7:15], one, rtol=0, atol=1e-6 * np.abs(one).max())


def test_a_long_video_needs_no_more_memory_than_a_short_one(small):
    """What the compiler sets aside beside arguments and result, for 2 and for 20 windows."""
    model, variables = small
    given = inputs(model, 1)

    def window(frames, rng):
        def predict(x, t):
            return model.apply(variables, **{**given, "latents": x, "given": frames, "times": t})

        clip = sample(predict, (1, 2, 4, 4, 2), schedule=Flow(2), solver=Euler(), rng=rng)
        return jnp.concatenate([frames, clip[:, 1:]], 1)

    sizes = []
    for windows in (4, 40):
        program = jax.jit(lambda f, n=windows: extend(window, f, jax.random.key(0), n))
        memory = program.lower(given["given"]).compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    frames = 36 * given["given"].size * 4  # that are more in the result
    assert sizes[1] < 1.1 * sizes[0] + 3 * frames


@pytest.mark.parametrize(
    "fields",
    [
        {"refine_text": False, "qk_norm": "layer"},
        {"qk_norm": None, "guidance_embed": True, "qkv_bias": False},
        {"activation": "silu", "mask_text": False},
    ],
)
def test_settings_of_the_code_round_trip(fields):
    model = zoo.create("magic_1_for_1_test", **fields)
    variables = filled(model)
    again = zoo.convert(model, zoo.export(model, variables))
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, again))
    assert np.isfinite(run(model, variables, inputs(model))).all()


def test_what_cannot_be_built_is_said_in_a_sentence(small):
    model, _ = small
    given = inputs(model)
    cases = (
        (model.clone(rope_dims=(4, 4, 6)), given, "must sum to the head's width, 12"),
        (model.clone(qk_norm="batch"), given, "qk_norm='batch' is none of"),
        (model, given | {"latents": given["latents"][:, :, :3]}, "whole patches of"),
    )
    for broken, x, message in cases:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(broken.init, jax.random.key(0), **x)


@pytest.mark.slow
def test_whole_numbers_for_weights_change_little_and_take_a_quarter(small):
    model, variables = small
    method = Int8(activations=None)
    given = inputs(model)
    adapted = method.adapt(model, variables, jax.random.key(1), [])
    wanted, got = (run(m, v, given) for m, v in ((model, variables), (method.wrap(model), adapted)))
    assert 0 < np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    before, after = (flatten_dict(v["params"]) for v in (variables, adapted))
    whole = {path for path, leaf in after.items() if leaf.dtype == jnp.int8}
    blocks = {
        path for path in before if path[-1] == "kernel" and path[0].startswith(("double", "single"))
    }
    assert blocks and blocks <= whole
    assert all(4 * after[path].nbytes == before[path].nbytes for path in blocks)
