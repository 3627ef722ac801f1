"""Namings in which people hold the weights of a system, beside the one of its authors."""

import json
import re

import jax
import numpy as np
import pytest
import torch_writer as tw

import zoo
from zoo.checkpoints import files
from zoo.checkpoints.rules import convert, convert_with_report, manifest
from zoo.models.imaging.styleswin import Discriminator
from zoo.registry import layouts

SHALLOW = {"depths": (1, 1), "dilations": None}


def drawn(model, layout=None, seed=0) -> dict[str, np.ndarray]:
    """A state dict of this layout with random numbers."""
    random, shapes = np.random.default_rng(seed), manifest(layouts(model), model, layout)
    return {n: random.standard_normal(s.shape).astype(s.dtype) for n, s in shapes.items()}


def renamed(state, *pairs) -> dict[str, np.ndarray]:
    result = {}
    for name, array in state.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        result[name] = array
    return result


def same(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), one, other)
    )


def norms(number: int, width: int = 8) -> dict[str, np.ndarray]:
    return {f"norm{number}.{leaf}": np.ones(width, np.float32) for leaf in ("weight", "bias")}


@pytest.mark.parametrize("name", ["dinat_test", "cswin_test"])
def test_backbones_of_detectors_have_a_norm_of_each_stage(name):
    model = zoo.create(name, **(SHALLOW if name == "dinat_test" else {}))
    state, first = drawn(model), 0 if name == "dinat_test" else 1
    held = renamed(state, (r"^norm\.", f"norm{first + 3}."), (r"^head\.", "gone."))
    held = {n: x for n, x in held.items() if not n.startswith("gone.")}
    for number in range(first, first + 3):
        held |= norms(number)
    held = {f"backbone.{n}": x for n, x in held.items()}
    held["decode_head.conv_seg.weight"] = np.ones((5, 3, 1, 1), np.float32)
    trunk = model.clone(num_classes=0)
    variables, report = convert_with_report(layouts(trunk), held, trunk)
    whole = convert(layouts(model), state, model)
    del whole["params"]["head"]
    assert same(variables, whole) and "decode_head.conv_seg.weight" in report.aside


@pytest.mark.parametrize(
    ("name", "change"),
    [("swin_test", (r"^layers\.", "layers_")), ("vit_test", (r"^", "model."))],
)
def test_timm_s_features_have_no_last_norm_which_starts_afresh(name, change):
    model = zoo.create(name)
    state = drawn(model, "timm")
    held = {n: x for n, x in state.items() if not n.startswith(("norm.", "head."))}
    variables, report = convert_with_report(
        layouts(model), renamed(held, change), model, adapt=True
    )
    assert set(report.fresh) == {"norm/scale", "norm/bias", "head/kernel", "head/bias"}
    whole = convert(layouts(model), state, model)
    for part in ("norm", "head"):
        del whole["params"][part], variables["params"][part]
    assert same(variables, whole)


def test_a_norm_behind_the_mean_is_no_other_name_of_the_last_one():
    model = zoo.create("vit_test", pool="avg", depth=1)
    token = zoo.create("vit_test", depth=1)
    with pytest.raises(ValueError, match="The file fits with pool='avg'"):
        convert(layouts(token), drawn(model, "timm"), token)


def test_neighbourhoods_of_transformers_are_split_and_their_backbones_are_read():
    model = zoo.create("dinat_test", layer_scale=1e-5, **SHALLOW)
    state = {}
    for name, array in drawn(model).items():
        if ".attn.qkv." in name:
            for part, x in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                state[name.replace("attn.qkv", f"attention.self.{part}")] = x
        elif name.endswith("gamma1"):
            state[name.replace("gamma1", "layer_scale_parameters")] = array
        else:
            state[name] = array
    for name in [n for n in state if n.endswith("gamma2")]:
        other = name.replace("gamma2", "layer_scale_parameters")
        state[other] = np.stack([state[other], state.pop(name)])
    state = renamed(
        state, (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^patch_embed", "embeddings"), (r"^levels\.(\d+)\.blocks", r"encoder.levels.\1.layers"),
        (r"^levels", "encoder.levels"), (r"attn\.rpb", "attention.self.rpb"),
        (r"attn\.proj", "attention.output.dense"), (r"(\d)\.norm1", r"\1.layernorm_before"),
        (r"(\d)\.norm2", r"\1.layernorm_after"), (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"), (r"^norm\.", "layernorm."), (r"^head\.", "classifier."),
    )  # fmt: skip
    whole = convert(layouts(model), drawn(model), model)
    held = {n if n.startswith("classifier") else f"dinat.{n}": x for n, x in state.items()}
    assert same(convert(layouts(model), held, model), whole)
    trunk = {n: x for n, x in state.items() if not n.startswith("classifier")}
    backbone = renamed(trunk, (r"^layernorm", "hidden_states_norms.stage4"))
    backbone |= {f"hidden_states_norms.stage{i}.weight": np.ones(4 * i, "f") for i in (1, 2, 3)}
    del whole["params"]["head"]
    bare = model.clone(num_classes=0)
    for held in (
        trunk,
        backbone,
        {f"model.pixel_level_module.encoder.{n}": x for n, x in backbone.items()},
    ):
        assert same(convert(layouts(bare), held, bare), whole)


def test_graphormers_of_transformers_have_no_pooler(tmp_path):
    model = zoo.create("graphormer_test")
    state = drawn(model)
    whole = convert(layouts(model), state, model)
    held = renamed(
        {n: x for n, x in state.items() if "masked_lm_pooler" not in n},
        (r"^encoder\.embed_out", "classifier.classifier"),
        (r"^encoder\.lm_output_learned_bias", "classifier.lm_output_learned_bias"),
    )
    files.save_safetensors(tmp_path / "model.safetensors", held)
    for name in ("unused_pooler_kernel", "unused_pooler_bias"):
        del whole["params"][name]
    read, variables = zoo.load("graphormer_test", tmp_path / "model.safetensors")
    assert same(variables, whole) and not read.masked_pooler
    config = dict(
        model_type="graphormer", num_atoms=64, num_in_degree=8, num_out_degree=8, num_edges=16,
        num_spatial=16, num_edge_dis=4, multi_hop_max_dist=3, num_hidden_layers=2, num_classes=2,
        embedding_dim=32, ffn_embedding_dim=32, num_attention_heads=4, spatial_pos_max=20,
        edge_type="multi_hop", pre_layernorm=False, activation_fn="gelu", embed_scale=None,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    read, variables = zoo.load(tmp_path)
    assert same(variables, whole) and (read.max_hops, read.max_distance) == (3, 19)


def test_token_layers_of_openmmlab_are_read():
    model = zoo.create("t2t_vit_test", performer=False)
    state = drawn(model, "transformer")
    held = renamed(
        state, (r"^head", "head.layers.head"), (r"^blocks", "backbone.encoder"),
        (r"^(cls_token|pos_embed|tokens_to_token|norm)", r"backbone.\1"),
        (r"(\d)\.norm(\d)", r"\1.ln\2"), (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
    )  # fmt: skip
    assert same(convert(layouts(model), held, model), convert(layouts(model), state, model))


def test_forecasters_of_the_library_have_their_head_in_the_decoder():
    model = zoo.create("informer_test")
    state = drawn(model)
    held = {f"module.{n}": x for n, x in renamed(state, (r"^proj", "decoder.proj")).items()}
    assert same(convert(layouts(model), held, model), convert(layouts(model), state, model))


def test_a_gan_is_read_by_its_parts(tmp_path):
    generator = zoo.create("styleswin_test")
    judge = Discriminator(size=16, base_channels=16)
    parts = {"g": drawn(generator), "d": drawn(judge, seed=1), "g_ema": drawn(generator, seed=2)}
    data, pickled = {}, {}
    for entry, arrays in parts.items():
        inner = {}
        for name, array in arrays.items():
            key = str(len(data))
            data[key] = array.tobytes()
            inner[name] = tw.tensor(key, array)
        pickled[entry] = tw.mapping(inner)
    path = tw.zip_file(tmp_path / "a.pt", tw.pickled(tw.mapping(pickled)), data)
    for model, weights, part in (
        (generator, None, "g_ema"),
        (generator, "g", "g"),
        (judge, "d", "d"),
    ):
        opened = files.open_checkpoint(path, weights)
        read = convert(layouts(model), opened, model)
        assert same(read, convert(layouts(model), parts[part], model)), part
