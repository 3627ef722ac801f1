import fill
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
    gradient,
    held_out_accuracy,
    random_images,
)

import zoo
from zoo.checkpoints.rules import CheckpointMismatch
from zoo.layers.position import resize_grid
from zoo.models.vision import dinat


def attention(x, kernel_size, dilation=1, heads=2):
    """A layer with parameters of unit scale, and a compiled function of the map."""
    layer = dinat.NeighborhoodAttention(heads, kernel_size, dilation)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    flat, tree = jax.tree.flatten(shapes)
    flat = [fill.uniform(str(i), leaf.shape) for i, leaf in enumerate(flat)]
    variables = jax.tree.unflatten(tree, flat)
    return variables["params"], jax.jit(lambda x: layer.apply(variables, x))


def dense_attention(x, params, heads, bias):
    """Attention over a whole map, from the definition, in float64."""
    x = np.asarray(x, np.float64)
    batch, channels = x.shape[0], x.shape[-1]
    flat = x.reshape(batch, -1, channels)
    qkv = flat @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(batch, -1, 3, heads, channels // heads), 2, 0)
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(channels // heads) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnqk,bknd->bqnd", weights, v).reshape(flat.shape)
    return (out @ params["out"]["kernel"] + params["out"]["bias"]).reshape(x.shape)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(dinat.__doc__)
    assert feature_shapes(zoo.create(name)) == table


# ------------------------------------------------------------------------ the mechanism


def test_a_neighbourhood_of_the_whole_map_is_full_attention_with_key_minus_query_bias():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
    params, run = attention(x, kernel_size=5)
    y, c = np.divmod(np.arange(25), 5)
    table = params["relative_position_bias"]
    bias = table[:, y[None, :] - y[:, None] + 4, c[None, :] - c[:, None] + 4]
    assert_trees_close(run(x), dense_attention(x, params, 2, bias), 1e-5)


def test_dilated_neighbourhoods_are_plain_ones_on_each_strided_image():
    x = jax.random.normal(jax.random.key(0), (2, 12, 10, 8))
    _, dilated = attention(x, kernel_size=3, dilation=2)
    _, plain = attention(x, kernel_size=3)
    whole = dilated(x)
    for i in range(2):
        for j in range(2):
            part = whole[:, i::2, j::2]
            assert_trees_close(part, plain(x[:, i::2, j::2]), 1e-5)


def test_away_from_borders_the_output_moves_with_the_map():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 8))
    _, run = attention(x, kernel_size=3, dilation=2)
    moved = run(jnp.roll(x, (2, 2), (1, 2)))
    still = jnp.roll(run(x), (2, 2), (1, 2))
    inside = slice(2 + 2, 16 - 2)  # the seam, and one dilated step from it
    assert_trees_close(moved[:, inside, inside], still[:, inside, inside], 1e-5)
    assert np.abs(moved[:, 0] - still[:, 0]).max() > 1e-2


def test_a_corner_sees_a_whole_neighbourhood_and_nothing_else():
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 8))
    _, run = attention(x, kernel_size=3, dilation=2)
    sees = jax.jacobian(lambda x: run(x)[0, 0, 0].sum())(x)[0]
    rows, columns = np.nonzero(np.abs(sees).max(-1))
    assert set(zip(rows, columns, strict=True)) == {(i, j) for i in (0, 2, 4) for j in (0, 2, 4)}


def test_a_small_map_attends_to_zero_padding_too():
    x = jax.random.normal(jax.random.key(0), (2, 4, 9, 8))
    params, run = attention(x, kernel_size=3, dilation=2)
    padded = jnp.zeros((2, 6, 9, 8)).at[:, :4].set(x)
    _, wide = attention(padded, kernel_size=3, dilation=2)
    assert_trees_close(run(x), wide(padded)[:, :4], 1e-5)
    changed = attention(x, 3, 2)[0]
    changed["qkv"]["bias"] = params["qkv"]["bias"] + 1.0  # padded keys hold it
    again = dinat.NeighborhoodAttention(2, 3, 2).apply({"params": changed}, x)
    assert np.abs(again - run(x)).max() > 1e-2


# ------------------------------------------------------------------------------- models


@pytest.mark.parametrize("overlapping", [True, False])
def test_every_image_size_is_taken_and_maps_round_up(overlapping):
    model = zoo.create("dinat_test", overlapping=overlapping, dilations=None)
    variables = filled(model)
    for height, width in ((3, 5), (50, 37)):
        images = jax.random.normal(jax.random.key(0), (1, height, width, 3))
        out = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, images)
        rows, columns = -(-height // 4), -(-width // 4)
        assert out["stage1"].shape == (1, rows, columns, 24)
        assert out["stage2"].shape == (1, -(-rows // 2), -(-columns // 2), 48)
    assert np.isfinite(apply(model, variables, images)).all()


def test_patches_and_odd_maps_are_completed_with_zeros():
    model = zoo.create("dinat_test", overlapping=False, depths=(0, 1), dilations=((), (1,)))
    variables = filled(model)
    images = jax.random.normal(jax.random.key(0), (1, 18, 30, 3))  # patches 5 x 8
    full = jnp.zeros((1, 20, 32, 3)).at[:, :18, :30].set(images)
    assert_trees_close(apply(model, variables, images), apply(model, variables, full), 1e-5)
    merge = dinat.PatchMerging(pad=True)
    x = jax.random.normal(jax.random.key(1), (1, 3, 4, 6))
    params = merge.init(jax.random.key(2), x)
    even = jnp.zeros((1, 4, 4, 6)).at[:, :3].set(x)
    np.testing.assert_array_equal(merge.apply(params, x), merge.apply(params, even))


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient():
    model = zoo.create("dinat_test", image_size=16, depths=(1, 1), dilations=None)
    variables, x = filled(model), random_images(model)
    plain = gradient(model, variables, x)
    assert_trees_close(gradient(model.clone(remat=True), variables, x), plain, 2e-5)


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
    assert held_out_accuracy("vision/dinat_digits.py", tmp_path) >= 0.94


# -------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("layout", ["huggingface", "huggingface_nat"])
def test_files_of_transformers_give_the_same_model(layout):
    model = zoo.create("dinat_test", layer_scale=1e-5)
    official = filled_state_dict(model)
    variables = zoo.convert(model, official)
    theirs = zoo.export(model, variables, layout)
    encoder = layout.removeprefix("huggingface_").replace("huggingface", "dinat") + ".encoder"
    block = f"{encoder}.levels.1.layers.0"
    np.testing.assert_array_equal(
        theirs[f"{block}.layer_scale_parameters"],
        np.stack([official[f"levels.1.blocks.0.gamma{i}"] for i in (1, 2)]),
    )
    np.testing.assert_array_equal(
        theirs[f"{block}.attention.self.key.weight"],
        official["levels.1.blocks.0.attn.qkv.weight"][48:96],
    )
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, theirs), variables)


def test_larger_neighbourhoods_take_resized_tables():
    """As the authors made their 11x11 models: bicubic over each head's table."""
    source = zoo.create("dinat_test")
    model = zoo.create("dinat_test", kernel_size=5, num_classes=3)
    state = filled_state_dict(source)
    with pytest.raises(CheckpointMismatch, match="adapt=True"):
        zoo.convert(model, state)
    params = zoo.convert(model, state, adapt=True)["params"]
    table = state["levels.1.blocks.0.attn.rpb"]
    got = params["stages_1"]["layers_0"]["attention"]["relative_position_bias"]
    assert got.shape == (4, 9, 9)
    for head in range(4):
        resized = resize_grid(table[head].reshape(25, 1), (5, 5), (9, 9))
        np.testing.assert_array_equal(got[head], resized.reshape(9, 9))


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"kernel_size": 4}, "kernel_size=4 has no centre"),
        ({"num_heads": (5, 4)}, "num_heads=5 does not divide 24"),
        ({"num_heads": (2,)}, "give one for each stage"),
        ({"dilations": ((1, 2), (1,))}, "do not fit depths"),
    ],
)
def test_wrong_fields_are_refused_with_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        model = zoo.create("dinat_test", **fields)
        jax.eval_shape(model.init, jax.random.key(0), random_images(model, 1))


def test_images_of_other_channels_are_refused():
    model = zoo.create("dinat_test")
    with pytest.raises(ValueError, match=r"\(batch, height, width, 3\), not \(1, 8, 8, 1\)"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
