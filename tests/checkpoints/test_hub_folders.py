"""Hugging Face folders: settings that shapes cannot show stand beside the weights."""

import json
import time

import jax
import numpy as np
import pytest

import zoo
from zoo.checkpoints import files, hub_config
from zoo.registry import canonical


def folder(path, model, config, layout=None, **beside):
    """A folder with a model's weights (zeros: only settings matter) and JSON files."""
    from zoo.checkpoints.rules import manifest
    from zoo.registry import layouts

    shapes = manifest(layouts(model), model, layout)
    state = {k: np.zeros(s.shape, s.dtype) for k, s in shapes.items()}
    files.save_safetensors(path / "model.safetensors", state)
    for name, content in {"config.json": config, **beside}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    return path


GPT2 = dict(model_type="gpt2", n_head=2, n_embd=32, n_layer=2, vocab_size=97, n_positions=64)


def test_settings_that_shapes_cannot_show_are_read(tmp_path, capsys):
    config = GPT2 | dict(activation_function="relu", scale_attn_by_inverse_layer_idx=True)
    source = folder(tmp_path, zoo.create("gpt2_test"), config)
    model, _ = zoo.load("gpt2_test", source)
    assert (model.num_heads, model.activation, model.scale_by_layer) == (2, "relu", True)
    assert "num_heads=2 (not 4)" in capsys.readouterr().err
    alone, _ = zoo.load(source)
    assert (alone.num_heads, alone.embed_dim, alone.depth, alone.vocab_size) == (2, 32, 2, 97)
    with pytest.raises(ValueError, match=r"num_heads=2, which contradicts num_heads=4"):
        zoo.load("gpt2_test", source, num_heads=4)


def test_what_the_model_does_not_do_is_refused(tmp_path):
    config = dict(model_type="bert", is_decoder=True)
    source = folder(tmp_path, zoo.create("bert_test"), config)
    with pytest.raises(ValueError, match="is_decoder=True"):
        zoo.load("bert_test", source)


@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "weightedmean_tokens"])
def test_pooling_is_read(tmp_path, mode):
    modes = {f"pooling_mode_{m}": m == mode for m in ("cls_token", "mean_tokens", mode)}
    model = zoo.create("bert_test", pooler=False)
    config = dict(model_type="bert", num_attention_heads=4)
    source = folder(tmp_path, model, config, **{"1_Pooling/config.json": modes})
    if mode == "weightedmean_tokens":
        with pytest.raises(ValueError, match="weightedmean"):
            zoo.load("bert_test", source, head="sentence", pooler=False)
        return
    model, _ = zoo.load("bert_test", source, head="sentence", pooler=False)
    assert model.pooling == mode.split("_")[0]


def test_images_are_fed_as_the_folder_says(tmp_path, capsys):
    how = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, size=32, resample=2)
    model = zoo.create("vit_test", num_classes=2, epsilon=1e-12)
    config = dict(
        model_type="vit", architectures=["ViTForImageClassification"], image_size=32,
        patch_size=8, hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=192, id2label={"0": "a", "1": "b"},
    )  # fmt: skip
    source = folder(tmp_path, model, config, "huggingface", **{"preprocessor_config.json": how})
    loaded, _, report = zoo.load(source, return_report=True)
    assert loaded == model and report.preprocessing.std == (0.25,) * 3
    assert "std (0.25, 0.25, 0.25)" in capsys.readouterr().err
    (source / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": [0, 0, 0]}')
    with pytest.raises(ValueError, match=r"has image_mean 0.5 and image_std \[0, 0, 0\]; lists of"):
        zoo.load(source)


def test_a_reformer_has_the_chunks_and_the_head_that_its_folder_says(tmp_path):
    config = dict(
        model_type="reformer", architectures=["ReformerForSequenceClassification"], vocab_size=97,
        hidden_size=32, attn_layers=["local", "lsh"], num_attention_heads=2, attention_head_size=16,
        feed_forward_size=64, axial_pos_shape=[8, 8], axial_pos_embds_dim=[12, 20],
        max_position_embeddings=64, num_buckets=[2, 4], num_hashes=3, lsh_attn_chunk_length=16,
        local_attn_chunk_length=4, is_decoder=False, id2label={"0": "a", "1": "b", "2": "c"},
    )  # fmt: skip
    model = zoo.create(
        "reformer_test", num_heads=2, head_dim=16, num_buckets=(2, 4), num_hashes=3, lsh_chunk=16,
        local_chunk=4, causal=False, head="classification", num_classes=3, dropout=0.05,
    )  # fmt: skip
    loaded, _ = zoo.load(folder(tmp_path, model, config))
    assert loaded == model


def test_each_choice_is_a_text_with_one_score(tmp_path):
    model = zoo.create("bert_test", head="classification", num_classes=1)
    config = dict(
        model_type="bert", architectures=["BertForMultipleChoice"], num_attention_heads=4,
        id2label={"0": "a", "1": "b"},
    )  # fmt: skip
    config |= dict(
        vocab_size=model.vocab_size, hidden_size=model.embed_dim, num_hidden_layers=model.depth,
        intermediate_size=model.mlp_dim, max_position_embeddings=model.max_positions,
    )  # fmt: skip
    loaded, _ = zoo.load(folder(tmp_path, model, config, "huggingface_heads"))
    assert (loaded.head, loaded.num_classes, loaded.pooler) == ("classification", 1, True)


def test_a_folder_that_does_not_say_what_it_is_needs_a_name(tmp_path):
    source = folder(tmp_path, zoo.create("gpt2_test"), {"model_type": "unheard"})
    with pytest.raises(ValueError, match=r"known here \(it says 'unheard'\); known are"):
        zoo.load(source)
    with pytest.raises(ValueError, match="needs the file or folder"):
        zoo.load("gpt2_test")


def test_every_kind_of_folder_is_a_model_with_its_settings():
    """With an empty configuration, each kind gives fields that its model takes."""
    for name, kind in hub_config.KINDS.items():
        variant = zoo.info(kind.base)
        known = {f for f in variant.module.__dataclass_fields__}
        named = {*kind.fields.values(), *kind.shown.values()}
        assert named <= known, name
        assert set(kind.more({}) if kind.more else ()) <= known, name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("google/vit-base-patch16-224", "vit_base_patch16_224"),
        ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224_in21k"),
        ("bert-base-uncased", "bert_base_uncased"),
        ("facebook/opt-125m", "opt_125m"),
        ("microsoft/swin-tiny-patch4-window7-224", "swin_tiny_patch4_window7_224"),
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm_l6_v2"),
        ("meta-llama/Llama-2-7b-hf", "llama2_7b"),
        ("no/such-thing", "no/such-thing"),
    ],
)
def test_hub_ids_and_tags_are_names(alias, name):
    assert canonical(alias) == name


def test_a_hub_that_does_not_answer_is_given_up_in_time(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    class Api:
        def list_repo_files(self, name, revision=None):
            time.sleep(60)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(files, "HUB_SECONDS", 0.6)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no answer"):
        zoo.load("org/name")
    assert time.monotonic() - start < 5


def test_a_type_that_is_asked_for_is_that_of_the_leaves(tmp_path):
    source = folder(tmp_path, zoo.create("gpt2_test"), GPT2)
    _, variables = zoo.load(source, param_dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(variables)} == {"bfloat16"}


@pytest.mark.parametrize("adapt", [False, True])
def test_a_file_decides_which_head_a_distilled_model_has(tmp_path, adapt, capsys):
    single = zoo.create("vit_test", distilled=True, distilled_head=False, depth=1)
    source = folder(tmp_path, single, {}, "huggingface_deit")
    model, _ = zoo.load("vit_test", source, distilled=True, depth=1, adapt=adapt)
    assert model == single and "distilled_head=False" in capsys.readouterr().err
