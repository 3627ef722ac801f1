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
from zoo.layers.attention import Attention
from zoo.layers.position import resize_grid
from zoo.layers.stack import stack_layers, unstack_layers
from zoo.models.vision import vit


@pytest.fixture(scope="module")
def small():
    """Four patches of 4x6, three blocks, weights of unit scale."""
    model = zoo.create("vit_test", image_size=(32, 48))
    return model, filled(model)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(vit.__doc__)
    model = zoo.create(name)
    blocks = {f"block{i}": (197, 384) for i in range(1, model.depth)}
    assert feature_shapes(model) == table | blocks


@pytest.mark.parametrize("length, width", [(197, 64), (198, 64), (50, 64), (25, 16)])
def test_attention_equals_the_definition(length, width):
    """softmax(q k^T / sqrt d) v, forward and gradient, at the lengths of ViT and DeiT."""
    heads = 2
    layer = Attention(heads)
    x = jax.random.normal(jax.random.key(0), (2, length, heads * width))
    variables = jax.tree.map(
        lambda p: fill.uniform(str(p.shape), p.shape) / np.sqrt(p.shape[0]),
        jax.eval_shape(layer.init, jax.random.key(1), x),
    )

    def definition(variables, x):
        params = variables["params"]
        qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
        q, k, v = jnp.moveaxis(qkv.reshape(2, length, 3, heads, width), 2, 0)
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(width)
        out = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores), v)
        out = out.reshape(2, length, heads * width)
        return out @ params["out"]["kernel"] + params["out"]["bias"]

    def value_and_gradients(f):
        loss = lambda v, x: (jnp.sin(f(v, x)).sum(), f(v, x))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, x)

    with jax.default_matmul_precision("highest"):
        got, wanted = map(value_and_gradients, (layer.apply, definition))
    # The softmax does not see a shift of all keys, so the gradient of their bias is rounding.
    for tree in (got, wanted):
        bias = tree[0][0]["params"]["qkv"]["bias"]
        tree[0][0]["params"]["qkv"]["bias"] = jnp.delete(
            bias, slice(heads * width, 2 * heads * width)
        )
    assert_trees_close(got, wanted, 1e-5)


def test_patches_have_no_order_but_their_positions(small):
    """Permuting patches together with their rows of the table leaves the logits unchanged."""
    model, variables = small
    x = random_images(model)
    order = np.random.default_rng(0).permutation(24)
    patches = x.reshape(2, 4, 8, 6, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 24, 8, 8, 3)
    moved = patches[:, order].reshape(2, 4, 6, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    table = variables["params"]["position_embedding"]
    table = jnp.concatenate([table[:, :1], table[:, 1:][:, order]], axis=1)
    params = {**variables["params"], "position_embedding": table}
    before = apply(model, variables, x)
    after = apply(model, {"params": params}, moved.reshape(x.shape))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    unmoved = apply(model, variables, moved.reshape(x.shape))
    assert np.abs(unmoved - before).max() > 1e-2 * np.abs(before).max()


def test_attention_maps_are_sown_when_asked_for(small):
    model, variables = small
    x = random_images(model)
    _, state = apply(model, variables, x, mutable=["intermediates"])
    weights = jax.tree.leaves(state["intermediates"])
    assert [w.shape for w in weights] == [(2, 3, 25, 25)] * 3
    for w in weights:
        np.testing.assert_allclose(w.sum(-1), 1.0, rtol=1e-5)


# ------------------------------------------------------------------- options and heads


def test_a_distilled_model_gives_the_mean_of_its_heads_and_both_in_training():
    model = zoo.create("vit_test", distilled=True)
    variables, x = filled(model), random_images(model)
    out = apply(model, variables, x, method="features")
    np.testing.assert_allclose(
        out["logits"], (out["logits_class"] + out["logits_distillation"]) / 2, rtol=1e-6
    )
    by_class, by_teacher = apply(model, variables, x, train=True)
    np.testing.assert_allclose(by_class, out["logits_class"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_teacher, out["logits_distillation"], rtol=1e-5, atol=1e-5)
    assert np.abs(by_class - by_teacher).max() > 0.1
    assert out["norm"].shape == (2, 2 + 16, 48)


def test_pooling_averages_patches_only_and_normalises_after():
    model = zoo.create("vit_test", pool="avg", num_registers=2)
    variables, x = filled(model), random_images(model)
    out = apply(model, variables, x, method="features")
    assert out["blocks"].shape == (2, 3 + 16, 48)
    np.testing.assert_array_equal(out["norm"], out["blocks"])
    mean = np.asarray(out["blocks"])[:, 3:].mean(1)
    normal = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    params = variables["params"]["pool_norm"]
    expected = normal * params["scale"] + params["bias"]
    assert_trees_close(out["pooled"], expected, 1e-5)
    assert "norm" not in variables["params"]


def test_positions_may_leave_the_prefix_out():
    everywhere = zoo.create("vit_test", num_registers=1)
    patches = everywhere.clone(position="patches")
    for model, rows in ((everywhere, 18), (patches, 16), (everywhere.clone(position="none"), None)):
        params = jax.eval_shape(model.init, jax.random.key(0), random_images(model, 1))["params"]
        table = params.get("position_embedding")
        assert (None if table is None else table.shape[1]) == rows


def test_a_layer_scale_of_zero_leaves_the_residual_stream_alone():
    model = zoo.create("vit_test", layer_scale=0.0)
    x = random_images(model)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    out = apply(model, variables, x, method="features")
    np.testing.assert_array_equal(out["blocks"], out["embed"])


def test_stochastic_depth_grows_with_depth_and_drops_whole_examples():
    model = zoo.create("vit_test", drop_path=0.6)
    variables, x = filled(model), random_images(model, 256)
    rngs = {"dropout": jax.random.key(3)}
    for scanned in (False, True):
        v = {"params": stack_layers(variables["params"])} if scanned else variables
        m = model.clone(scan_layers=scanned)
        out = apply(m, v, x, train=True, rngs=rngs, method="features")
        stream = [out["embed"], out["block0"], out["block1"], out["block2"]]
        pairs = zip(stream[1:], stream, strict=False)
        still = [float((jnp.abs(b - a).max((1, 2)) == 0).mean()) for b, a in pairs]
        # both branches of a block dropped: rates 0, 0.3 and 0.6, squared
        np.testing.assert_allclose(still, [0.0, 0.09, 0.36], atol=0.1)


# ---------------------------------------------------------- loop, scan, recomputation


@pytest.mark.parametrize(
    "scan, remat", [(True, False), (False, True), (True, "dots"), (True, "attention")]
)
def test_scanned_and_recomputed_blocks_are_the_same_function(small, scan, remat):
    model, variables = small
    other = model.clone(scan_layers=scan, remat=remat)
    params = stack_layers(variables["params"]) if scan else variables["params"]
    x = random_images(model)
    plain = apply(model, variables, x, method="features")
    assert_trees_close(apply(other, {"params": params}, x, method="features"), plain, 1e-5)
    got = gradient(other, {"params": params}, x)["params"]
    got = unstack_layers(got) if scan else got
    assert_trees_close(got, gradient(model, variables, x)["params"], 5e-5)


def test_both_forms_of_the_parameters_convert_into_each_other(small):
    model, variables = small
    scanned = model.clone(scan_layers=True)
    stacked = stack_layers(variables["params"])
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), random_images(model, 1))["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), variables["params"])
    state = zoo.export(model, variables)
    loaded = zoo.convert(scanned, state)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], stacked)
    again = zoo.export(scanned, loaded)
    assert all(again[name].tobytes() == value.tobytes() for name, value in state.items())


# -------------------------------------------------------------------------- checkpoints


def google_names(state, heads):
    """What Google's npz of the same weights holds, written from the card."""

    def kernel(name, *shape):
        return state[f"{name}.weight"].T.reshape(shape or state[f"{name}.weight"].T.shape)

    width = state["cls_token"].shape[-1]
    out = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": kernel("head"),
        "head/bias": state["head.bias"],
    }
    for i in range(3):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for norm, name in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            out[f"{theirs}/{norm}/scale"] = state[f"{ours}.{name}.weight"]
            out[f"{theirs}/{norm}/bias"] = state[f"{ours}.{name}.bias"]
        for j, name in enumerate(("query", "key", "value")):
            part = slice(j * width, (j + 1) * width)
            where = f"{theirs}/MultiHeadDotProductAttention_1/{name}"
            weight = state[f"{ours}.attn.qkv.weight"][part]
            out[f"{where}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{where}/bias"] = state[f"{ours}.attn.qkv.bias"][part].reshape(heads, -1)
        where = f"{theirs}/MultiHeadDotProductAttention_1/out"
        out[f"{where}/kernel"] = kernel(f"{ours}.attn.proj", heads, -1, width)
        out[f"{where}/bias"] = state[f"{ours}.attn.proj.bias"]
        for j, name in enumerate(("fc1", "fc2")):
            out[f"{theirs}/MlpBlock_3/Dense_{j}/kernel"] = kernel(f"{ours}.mlp.{name}")
            out[f"{theirs}/MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}.mlp.{name}.bias"]
    return out


def hugging_face_names(state, _):
    """What a Hugging Face ViTForImageClassification of the same weights holds."""
    out = {}
    for name, value in state.items():
        for old, new in (
            ("cls_token", "vit.embeddings.cls_token"),
            ("pos_embed", "vit.embeddings.position_embeddings"),
            ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            ("blocks.", "vit.encoder.layer."),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("head.", "classifier."),
        ):
            name = name.replace(old, new)
        if "attn.qkv" in name:
            for part, new in zip(np.split(value, 3), ("query", "key", "value"), strict=True):
                out[name.replace("attn.qkv", f"attention.attention.{new}")] = part
        else:
            name = f"vit.layer{name}" if name.startswith("norm.") else name
            out[name] = value
    return out


@pytest.mark.parametrize("rename", [google_names, hugging_face_names])
def test_all_published_namings_give_the_same_model(rename):
    model = zoo.create("vit_test")
    state = filled_state_dict(model)
    expected = zoo.convert(model, state)
    renamed = rename(state, model.num_heads)
    assert not set(renamed) & set(state)
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, renamed), expected)
    layout = "google" if rename is google_names else "huggingface"
    exported = zoo.export(model, expected, layout)
    assert set(exported) == set(renamed)
    for name, value in renamed.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_other_image_sizes_take_resized_positions():
    """As DeiT's code: prefix rows as they are, the grid by torch's bicubic interpolation."""
    torch = pytest.importorskip("torch")
    source = zoo.create("vit_test", distilled=True)
    state = filled_state_dict(source)
    model = source.clone(image_size=(48, 64), num_classes=3)
    with pytest.raises(CheckpointMismatch, match="adapt=True"):
        zoo.convert(model, state)
    params = zoo.convert(model, state, adapt=True)["params"]
    table = state["pos_embed"]
    grid = torch.from_numpy(table[:, 2:].reshape(1, 4, 4, 48).astype(np.float64))
    grid = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2), size=(6, 8), mode="bicubic", align_corners=False
    )
    grid = grid.permute(0, 2, 3, 1).reshape(1, 48, 48).numpy()
    np.testing.assert_array_equal(params["position_embedding"][:, :2], table[:, :2])
    np.testing.assert_allclose(params["position_embedding"][:, 2:], grid, rtol=0, atol=2e-7)
    for head in ("head", "head_distillation"):
        assert params[head]["kernel"].shape == (48, 3)


def test_tables_of_a_grid_that_is_not_square_are_refused():
    state = filled_state_dict(zoo.create("vit_test", image_size=(32, 48)))
    with pytest.raises(ValueError, match="25 rows is not a square grid behind 1 prefix"):
        zoo.convert(zoo.create("vit_test", image_size=64), state, adapt=True)


def test_tables_of_a_grid_in_the_new_ones_proportions_are_resized():
    state = filled_state_dict(zoo.create("vit_test", image_size=(16, 48), depth=1))
    model = zoo.create("vit_test", image_size=(24, 72), depth=1)
    table = zoo.convert(model, state, adapt=True)["params"]["position_embedding"]
    want = resize_grid(np.asarray(state["pos_embed"])[0, 1:], (2, 6), (3, 9))
    np.testing.assert_array_equal(table[0, 1:], want)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"pool": "mean"}, "pool='mean' is none of 'token', 'avg'"),
        ({"position": "some"}, "position='some' is none of"),
        ({"class_token": False}, "reads the class token"),
        ({"distilled": True, "pool": "avg"}, "distilled=True reads the class and the distillation"),
        ({"num_heads": 5}, "num_heads=5 does not divide 48 channels"),
        ({"image_size": 30}, "whole number of 8x8 patches"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, sentence):
    model = zoo.create("vit_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(model.init, jax.random.key(0), random_images(model, 1))


def test_images_of_another_size_are_refused(small):
    model, variables = small
    with pytest.raises(ValueError, match=r"\(batch, 32, 48, 3\), not \(1, 32, 32, 3\)"):
        model.apply(variables, jnp.zeros((1, 32, 32, 3)))
