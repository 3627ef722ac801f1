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
from zoo.models.video import predformer
from zoo.models.video.predformer import ORDERS, GatedTransformer, positions


def clip(model, batch=2, key=0):
    return jax.random.normal(jax.random.key(key), model.example_inputs(batch)["frames"].shape)


@pytest.fixture(scope="module")
def small():
    model = zoo.create("predformer_test")
    return model, filled(model)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(predformer.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_positions_count_through_the_clip():
    """The definition, in Python's numbers; an odd width ends in a sine."""
    table = positions(50, 7)
    for p in (0, 1, 49):
        for i in range(7):
            angle = p / 10000 ** (2 * (i // 2) / 7)
            np.testing.assert_allclose(table[p, i], (np.cos if i % 2 else np.sin)(angle), atol=1e-5)


def test_patches_are_read_and_written_in_different_orders():
    """Pixels go in as (row, column, channel) and come out as (channel, row, column)."""
    model = zoo.create("predformer_test", num_layers=0)
    variables = filled(model)
    params = variables["params"]
    frames = clip(model, 1)
    tokens = apply(model, variables, frames, method="features")["embed"]
    patch = frames[0, 1, 4:, :4].reshape(-1) @ params["embed"]["kernel"] + params["embed"]["bias"]
    np.testing.assert_allclose(tokens[0, 1, 2], patch + positions(12, 16)[6], rtol=1e-5, atol=1e-5)
    x = tokens[0, 1, 2]
    x = (x - x.mean()) / jnp.sqrt(x.var() + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    out = (x @ params["head"]["kernel"] + params["head"]["bias"]).reshape(2, 4, 4)
    ours = apply(model, variables, frames)[0, 1, 4:, :4]
    np.testing.assert_allclose(ours, jnp.moveaxis(out, 0, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_layer_sees_follows_its_order(order):
    """One layer of T and S reaches every token; only the first of a deep one, its own axis."""
    model = zoo.create("predformer_test", order=order)
    variables = filled(model)
    frames = clip(model, 1)
    moved = frames.at[0, 1, :4, :4].add(1.0)
    first, second = (apply(model, variables, x, method="features") for x in (frames, moved))
    reached = np.abs(first["layer1"] - second["layer1"])[0].max(-1) > 0
    frame, place = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    frame[1], place[:, 0] = True, True
    wanted = {"FacST": frame, "FacTS": place}.get(order, np.ones((3, 4), bool))
    np.testing.assert_array_equal(reached, wanted)


def gated(axis, depth=2):
    from functools import partial

    block = partial(predformer.Block, 2, 4, 16)
    return GatedTransformer(axis, depth, block)


def test_one_axis_is_the_whole_where_the_other_has_length_one():
    """With one frame, space is everything; with one place, time is."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 8))
    variables = jax.jit(gated("space_temporal").init)(jax.random.key(1), x)
    for part, axis in ((x[:, :1], "space"), (x[:, :, :1], "temporal")):
        whole = apply(gated("space_temporal"), variables, part)
        assert_trees_close(apply(gated(axis), variables, part), whole, 1e-5)


def test_attention_over_one_token_is_its_value():
    x = jax.random.normal(jax.random.key(0), (3, 1, 8))
    attention = predformer.Attention(2, 6)
    variables = jax.jit(attention.init)(jax.random.key(1), x)
    p = variables["params"]
    value = x @ p["qkv"]["kernel"][:, 24:] @ p["out"]["kernel"] + p["out"]["bias"]
    assert_trees_close(apply(attention, variables, x), np.asarray(value), 1e-5)


def test_one_head_as_wide_as_the_model_has_no_output_matrix():
    x = jnp.zeros((1, 4, 8))
    shapes = jax.eval_shape(predformer.Attention(1, 8).init, jax.random.key(0), x)
    assert set(shapes["params"]) == {"qkv"}
    shapes = jax.eval_shape(predformer.Attention(2, 4).init, jax.random.key(0), x)
    assert set(shapes["params"]) == {"qkv", "out"}


def test_permuting_places_permutes_what_a_layer_gives(small):
    """Space has no order but the table of positions."""
    model, variables = small
    x = jax.random.normal(jax.random.key(0), (1, 3, 5, 16))
    params = {"params": variables["params"]["layers_0"]["ts_space"]}
    block = model.bind(variables)  # the fields of its blocks
    hidden = int(block.embed_dim * block.mlp_ratio)
    from functools import partial

    layer = GatedTransformer("space", 1, partial(predformer.Block, 2, 6, hidden))
    order = np.array([3, 1, 4, 0, 2])
    permuted = apply(layer, params, x[:, :, order])
    assert_trees_close(permuted, np.asarray(apply(layer, params, x))[:, :, order], 1e-5)


def test_longer_horizons_are_forecasts_of_forecasts(small):
    model, variables = small
    frames = clip(model, 1)
    once = apply(model, variables, frames)
    twice = apply(model, variables, once)
    long = jax.jit(lambda v, x: predformer.continue_clip(model, v, x, 5))(variables, frames)
    both = np.concatenate([once, twice], 1)
    assert_trees_close(long, both[:, :5], 1e-5)


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing(small):
    model, variables = small
    x = clip(model, 1)
    assert_trees_close(
        gradient(model.clone(remat=True), variables, x), gradient(model, variables, x), 1e-5
    )


def test_what_cannot_be_built_is_said_in_a_sentence(small):
    model, variables = small
    with pytest.raises(ValueError, match=r"clips of shape \(batch, 3, 8, 8, 2\)"):
        model.apply(variables, jnp.zeros((1, 4, 8, 8, 2)))
    for fields, message in (({"order": "TSST"}, "order='TSST' is none of FullAttention"),
                            ({"patch_size": 3}, "not whole patches of 3x3")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.clone(**fields).apply(variables, clip(model))
