import re
from functools import partial

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
    random_images,
)

import zoo
from zoo.checkpoints.rules import CheckpointMismatch
from zoo.layers.block import ResidualBlock
from zoo.layers.mlp import Mlp
from zoo.layers.position import bicubic_matrix, relative_position_index, resize_grid
from zoo.layers.window import (
    ShiftedWindowAttention,
    WindowAttention,
    fit_window,
    shifted_window_mask,
    window_merge,
    window_partition,
)
from zoo.models.vision import swin


@pytest.fixture(scope="module")
def small():
    """Two stages, shifted windows, and weights of unit scale."""
    model = zoo.create("swin_test", image_size=(32, 48), depths=(2, 1), absolute_position=True)
    return model, filled(model)


def block_of_windows(channels, shift=0, drop_path=0.0):
    """A block with windows of 4x4 tokens."""
    attention = partial(
        ShiftedWindowAttention, num_heads=2, window=(4, 4), shift=(shift, shift), name="attention"
    )
    mlp = partial(Mlp, 4 * channels, name="mlp")
    return ResidualBlock(attention, mlp, drop_path=drop_path)


def unit_scale(variables):
    """The same tree with larger numbers than those of initialisation."""
    flat, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(tree, [fill.uniform(str(i), p.shape) for i, p in enumerate(flat)])


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(swin.__doc__)
    assert feature_shapes(zoo.create(name)) == table


# ------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("size", [(7, 14), (14, 14), (21, 7)])
def test_windows_equal_dense_attention_with_a_block_mask(size, shift):
    """In float64, against attention over the whole rolled map written from the definition."""
    window, heads, width = 7, 2, 6
    height, columns = size
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, height, columns, heads * width))
        layer = WindowAttention(heads, (window, window), dtype=jnp.float64, param_dtype=jnp.float64)
        mask = shifted_window_mask(size, (window,) * 2, (shift,) * 2) if shift else None
        tokens = window_partition(np.roll(x, (-shift, -shift), (1, 2)), (window, window))
        variables = layer.init(jax.random.key(1), tokens, mask)
        variables = jax.tree.map(lambda p: 3 * rng.normal(size=p.shape) / p.shape[0], variables)
        ours = window_merge(layer.apply(variables, tokens, mask), size, (window, window))
        ours = np.roll(ours, (shift, shift), (1, 2))

    params = variables["params"]
    y, c = np.divmod(np.arange(height * columns), columns)  # position of each token
    ry, rc = (y - shift) % height, (c - shift) % columns  # where the roll puts it
    same = (ry[:, None] // window == ry // window) & (rc[:, None] // window == rc // window)
    for at, rolled in ((y, ry), (c, rc)):  # a roll may not make neighbours of the two ends
        came_round = rolled > at
        same &= came_round[:, None] == came_round
    offset = (ry[:, None] - ry + window - 1) * (2 * window - 1) + rc[:, None] - rc + window - 1
    flat = x.reshape(2, -1, heads * width)
    qkv = flat @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(2, -1, 3, heads, width), 2, 0)
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(width)
    table = params["relative_position_bias"]
    bias = np.where(same[..., None], table[np.where(same, offset, 0)], -np.inf)
    scores = scores + np.moveaxis(bias, -1, 0)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dense = np.einsum("bnqk,bknd->bqnd", weights, v).reshape(flat.shape)
    dense = dense @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(ours.reshape(flat.shape), dense, rtol=0, atol=1e-10)


def test_shifted_windows_do_not_see_across_the_seam():
    """A change in one corner of the map reaches its own window only, not the one rolled to it."""
    block = block_of_windows(8, shift=2)
    x = jax.random.normal(jax.random.key(0), (1, 12, 12, 8))
    variables = unit_scale(jax.jit(block.init)(jax.random.key(1), x))
    before = apply(block, variables, x)
    changed = np.abs(apply(block, variables, x.at[0, 0, 0, :4].add(1.0)) - before)
    rows, columns = np.nonzero(changed[0].max(-1))
    assert set(zip(rows, columns, strict=True)) == {(i, j) for i in range(2) for j in range(2)}


def test_unshifted_blocks_commute_with_moving_the_image_by_a_window(small):
    model, variables = small
    block = block_of_windows(model.embed_dim)

    @jax.jit
    def first_block(x):
        params = variables["params"]
        tokens = model.apply(variables, x, method="features")["patch_embed"]
        return block.apply({"params": params["stages_0"]["layers_0"]}, tokens)

    x = random_images(model)
    pixels, tokens = 4 * 2, 4  # a window, at 2x2 patches
    moved = first_block(jnp.roll(x, (pixels, 2 * pixels), (1, 2)))
    still = jnp.roll(first_block(x), (tokens, 2 * tokens), (1, 2))
    assert_trees_close(moved, still, 1e-5)


def test_a_small_map_is_one_window_without_shift():
    assert fit_window((7, 7), 7, shifted=True) == (7, 0)
    assert fit_window((14, 14), 7, shifted=True) == (7, 3)
    assert fit_window((4, 8), 7, shifted=True) == (4, 0)
    model = zoo.create("swin_test", image_size=16, window_size=8)  # maps of 8x8 and 4x4
    params = jax.eval_shape(model.init, jax.random.key(0), random_images(model, 1))["params"]
    tables = [
        params[f"stages_{s}"]["layers_1"]["attention"]["relative_position_bias"] for s in (0, 1)
    ]
    assert [t.shape for t in tables] == [(15**2, 2), (7**2, 4)]


def test_bias_index_is_query_minus_key():
    index = relative_position_index((3, 4))
    assert index.shape == (12, 12) and index.max() == 5 * 7 - 1
    i, j = 1 * 4 + 3, 2 * 4 + 1  # query (1, 3), key (2, 1): offset (-1, 2)
    assert index[i, j] == (-1 + 2) * 7 + (2 + 3)
    assert index[i, j] + index[j, i] == 5 * 7 - 1  # opposite offsets are mirrored


def test_the_merge_takes_down_before_right():
    x = jnp.arange(16.0).reshape(1, 2, 2, 4)
    merge = swin.PatchMerging()
    variables = merge.init(jax.random.key(0), x)
    params = variables["params"]
    order = jnp.concatenate([x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]])
    normal = (order - order.mean()) / jnp.sqrt(order.var() + 1e-5)
    expected = normal @ params["reduction"]["kernel"]
    np.testing.assert_allclose(merge.apply(variables, x)[0, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_attention_maps_are_sown_when_asked_for(small):
    model, variables = small
    x = random_images(model)
    logits, state = apply(model, variables, x, mutable=["intermediates"])
    np.testing.assert_allclose(logits, apply(model, variables, x), rtol=1e-5, atol=1e-5)
    weights = jax.tree.leaves(state["intermediates"])
    assert len(weights) == sum(model.depths)
    for w in weights:
        np.testing.assert_allclose(w.sum(-1), 1.0, rtol=1e-5)


# ----------------------------------------------------------------------------- training


def test_recomputing_blocks_changes_no_gradient(small):
    model, variables = small
    x = random_images(model)
    plain = gradient(model, variables, x)
    assert_trees_close(gradient(model.clone(remat=True), variables, x), plain, 2e-5)


def test_every_parameter_gets_a_finite_gradient_in_training(small):
    model, variables = small
    model = model.clone(drop_path=0.2, dropout=0.1, attention_dropout=0.1)
    x = random_images(model, 4)
    grads = gradient(model, variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    for path, g in jax.tree.leaves_with_path(grads):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_stochastic_depth_drops_whole_examples():
    block = block_of_windows(8, drop_path=0.5)
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 8))
    variables = jax.jit(block.init)(jax.random.key(1), x)
    y = apply(block, variables, x, train=True, rngs={"dropout": jax.random.key(2)})
    kept = np.abs(np.asarray(y - x)).max((1, 2, 3)) > 0
    assert 0.5 < kept.mean() < 0.95  # two branches, each kept with probability one half: 3/4


# -------------------------------------------------------------------------- checkpoints


def timm_name(name):
    name = re.sub(
        r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name
    )
    return re.sub(r"^head\.", "head.fc.", name)


def torchvision_name(name):
    name = name.replace("patch_embed.proj", "features.0.0").replace(
        "patch_embed.norm", "features.0.2"
    )
    name = re.sub(r"layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
    name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", name)
    return name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")


@pytest.mark.parametrize("rename", [timm_name, torchvision_name])
def test_all_published_namings_give_the_same_model(rename):
    model = zoo.create("swin_test", depths=(2, 2, 1), num_heads=(2, 4, 4))
    official = filled_state_dict(model)
    expected = zoo.convert(model, official)
    renamed = {rename(name): value for name, value in official.items()}
    assert set(renamed) != set(official)
    if rename is torchvision_name:  # which stores its index flat
        index = relative_position_index((4, 4)).reshape(-1)
        renamed |= {
            name.replace("bias_table", "index"): index for name in renamed if "bias_table" in name
        }
    got = zoo.convert(model, renamed)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_recomputed_tensors_come_back(small):
    model, variables = small
    state = zoo.export(model, variables)
    assert state["layers.0.blocks.1.attn_mask"].shape == (24, 16, 16)
    assert "layers.0.blocks.0.attn_mask" not in state
    index = state["layers.1.blocks.0.attn.relative_position_index"]
    assert index.dtype == np.int64 and index.shape == (16, 16)


def test_larger_windows_take_resized_tables():
    """As the official code: bicubic over the (2M-1) x (2M-1) grid of each head."""
    torch = pytest.importorskip("torch")
    source = zoo.create("swin_test", image_size=32, window_size=4)
    model = zoo.create("swin_test", image_size=64, window_size=8, num_classes=3)
    state = filled_state_dict(source)
    with pytest.raises(CheckpointMismatch, match="adapt=True"):
        zoo.convert(model, state)
    params = zoo.convert(model, state, adapt=True)["params"]
    table = state["layers.0.blocks.1.attn.relative_position_bias_table"]
    grid = torch.from_numpy(table.T.reshape(1, 2, 7, 7).astype(np.float64))
    grid = torch.nn.functional.interpolate(grid, size=(15, 15), mode="bicubic")
    got = params["stages_0"]["layers_1"]["attention"]["relative_position_bias"]
    np.testing.assert_allclose(got, grid.reshape(2, 225).T.numpy(), rtol=0, atol=2e-7)
    assert params["head"]["kernel"].shape == (48, 3)


@pytest.mark.parametrize("old, new", [((7, 7), (12, 12)), ((23, 23), (13, 13)), ((5, 3), (4, 9))])
def test_resizing_is_that_of_torch(old, new):
    torch = pytest.importorskip("torch")
    table = fill.uniform("table", (old[0] * old[1], 3))
    grid = torch.from_numpy(table.T.reshape(1, 3, *old).astype(np.float64))
    grid = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    expected = grid.reshape(3, -1).T.numpy()
    np.testing.assert_allclose(resize_grid(table, old, new), expected, rtol=0, atol=2e-7)


def test_the_cubic_kernel_is_torchs():
    """A line of a 4 -> 6 resize as PyTorch 2.13 computes it, for machines without PyTorch."""
    expected = [0.5, 0.59375, -0.09375, 0.0]
    np.testing.assert_allclose(bicubic_matrix(4, 6)[1], expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"image_size": 36}, "map of 18x18 tokens cannot be cut into 4x4 windows"),
        ({"image_size": 33}, "whole number of 2x2 patches"),
        ({"image_size": 10, "window_size": 5}, "Patch merging needs an even map, not 5x5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_size(fields, sentence):
    model = zoo.create("swin_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(model.init, jax.random.key(0), random_images(model, 1))


def test_images_of_another_size_are_refused(small):
    model, variables = small
    with pytest.raises(ValueError, match=r"\(batch, 32, 48, 3\), not \(1, 64, 64, 3\)"):
        model.apply(variables, jnp.zeros((1, 64, 64, 3)))


def test_padded_maps_take_images_of_any_size_and_change_nothing_where_all_fits():
    stage = dict(depths=(2,), num_heads=(2,), drop_path=0.0)
    model, padded = (zoo.create("swin_test", pad=pad, **stage) for pad in (False, True))
    size = model.image_size
    images = jax.random.normal(jax.random.key(0), (1, *size, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    want, got = (jax.jit(m.apply)(variables, images) for m in (model, padded))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    odd = jnp.pad(images, ((0, 0), (0, 5), (0, 3), (0, 0)))
    maps = jax.eval_shape(lambda x: padded.apply(variables, x, method="features"), odd)
    assert maps["stage1"].shape[1] == -(-(size[0] + 5) // model.patch_size)
    with pytest.raises(ValueError, match="pad=True"):
        model.apply(variables, odd)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x.transpose(0, 3, 1, 2), "channels first"),
        (lambda x: (x * 255).astype(jnp.uint8), "divide by 255"),
    ],
)
def test_images_in_another_form_are_refused_with_what_to_do(change, text):
    model = zoo.create("swin_test")
    images = jnp.zeros((2, *model.image_size, 3))
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(lambda: model.init(jax.random.key(0), change(images)))
