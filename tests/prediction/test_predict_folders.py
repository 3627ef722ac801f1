"""Answers of a folder of transformers by itself: settings, pictures' form, names and tokens."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import zoo
from zoo.checkpoints import files
from zoo.checkpoints.rules import convert, manifest
from zoo.cli import main
from zoo.data.transforms import resize_image
from zoo.prediction import of_model
from zoo.registry import layouts

LABELS = {"0": "night", "1": "day"}
VIT = dict(
    model_type="vit", architectures=["ViTForImageClassification"], image_size=32, patch_size=8,
    hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=192,
    id2label=LABELS,
)  # fmt: skip
BERT = dict(
    model_type="bert", architectures=["BertForSequenceClassification"], num_attention_heads=4,
    hidden_size=32, num_hidden_layers=1, intermediate_size=64, id2label=LABELS,
)  # fmt: skip
GPT2 = dict(
    model_type="gpt2", architectures=["GPT2LMHeadModel"], n_head=4, n_embd=32, n_layer=1,
    n_positions=64, eos_token_id=0,
)  # fmt: skip
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "film", "bad")


def folder(path, model, config, layout, **beside):
    """A folder with random weights; the model's variables."""
    random, state = np.random.default_rng(0), {}
    for name, shape in manifest(layouts(model), model, layout).items():
        state[name] = (random.normal(size=shape.shape) / 4).astype(shape.dtype)
    files.save_safetensors(path / "model.safetensors", state)
    for name, content in {"config.json": config, **beside}.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return convert(layouts(model), state, model)


def asked(capsys, *command) -> list[dict]:
    assert main(["predict", *map(str, command), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_pictures_are_classified_as_the_folder_says(tmp_path, capsys):
    how = dict(
        image_mean=[0.5] * 3, image_std=[0.25] * 3, size={"height": 40, "width": 40}, resample=2,
        crop_size={"height": 32, "width": 32}, do_center_crop=True,
    )  # fmt: skip
    model = zoo.create("vit_test", num_classes=2, epsilon=1e-12, depth=1)
    variables = folder(tmp_path, model, VIT, "huggingface", **{"preprocessor_config.json": how})
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (row,) = asked(capsys, tmp_path, tmp_path / "a.png", "--batch-size", 1)
    image = resize_image(pixels, (40, 40), "bilinear")[4:36, 4:36]
    image = (image.astype(np.float32) / 255 - 0.5) / 0.25
    want = jax.nn.softmax(jax.jit(model.apply)(variables, image[None]))[0]
    assert row["label"] == list(LABELS.values())[int(want.argmax())]
    assert row["probability"] == pytest.approx(float(want.max()), rel=1e-4)


def test_texts_are_classified_with_the_tokenizer_of_the_folder(tmp_path, capsys):
    model = zoo.create(
        "bert_test", head="classification", pooler=True, num_classes=2, depth=1, vocab_size=8
    )
    variables = folder(
        tmp_path, model, BERT | {"vocab_size": 8, "max_position_embeddings": model.max_positions},
        "huggingface_heads", **{"vocab.txt": "\n".join(WORDS)},
    )  # fmt: skip
    (row,) = asked(capsys, tmp_path, "a good film", "--batch-size", 1)
    want = jax.nn.softmax(jax.jit(model.apply)(variables, np.array([[2, 4, 5, 6, 3]])))[0]
    assert row["label"] == list(LABELS.values())[int(want.argmax())]
    assert row["probability"] == pytest.approx(float(want.max()), rel=1e-4)


@pytest.mark.slow
def test_texts_are_continued_up_to_their_end(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("<end>", "a", "good", "film", "bad"))}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = zoo.create("gpt2_test", depth=1, vocab_size=5)
    variables = folder(
        tmp_path, model, GPT2 | {"vocab_size": 5}, None, **{"tokenizer.json": library.to_str()}
    )
    (row,) = asked(capsys, tmp_path, "a good film", "--steps", 6)
    tokens, call = [1, 2, 3], jax.jit(model.apply)
    for _ in range(6):
        tokens.append(int(call(variables, np.array([tokens]))[0, -1].argmax()))
    new = tokens[3:]
    new = new[: new.index(0)] if 0 in new else new
    assert row["continuation"] == " ".join(list(words)[i] for i in new)


@pytest.mark.slow
def test_texts_are_continued_with_pieces_and_merges_beside_the_weights(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|endoftext|>", *letters, "go", "od", "good"]
    model = zoo.create("gpt2_test", depth=1, vocab_size=len(pieces))
    variables = folder(
        tmp_path, model, GPT2 | {"vocab_size": len(pieces)}, None,
        **{"vocab.json": {piece: i for i, piece in enumerate(pieces)},
           "merges.txt": "#version: 0.2\ng o\no d\ngo od\n"},
    )  # fmt: skip
    (row,) = asked(capsys, tmp_path, "a good", "--steps", 3)
    tokens = [pieces.index(piece) for piece in ("a", "Ġ", "good")]
    for _ in range(3):
        tokens.append(int(model.apply(variables, np.array([tokens]))[0, -1].argmax()))
    assert 0 not in tokens  # else the continuation would end there
    bytes_of = tokenizers.decoders.ByteLevel().decode
    assert row["continuation"] == bytes_of([pieces[t] for t in tokens[3:]])


def test_one_class_is_a_score(tmp_path):
    model = zoo.create("gpt2_test", depth=1, num_classes=1)
    config = GPT2 | {"vocab_size": 97, "architectures": ["GPT2ForSequenceClassification"]}
    variables = folder(tmp_path, model, config | {"id2label": {"0": "reward"}}, None)
    tokens = np.arange(8)[None]
    said = of_model(None, tmp_path)({"tokens": tokens, "mask": np.ones_like(tokens)})
    np.testing.assert_allclose(said["output"], model.apply(variables, tokens), rtol=1e-4, atol=1e-5)


def test_a_head_that_the_model_does_not_have_is_said(tmp_path, capsys):
    model = zoo.create("gpt2_test", depth=1)
    config = GPT2 | {"vocab_size": 97, "architectures": ["GPT2ForTokenClassification"]}
    folder(tmp_path, model, config, None)
    assert main(["predict", str(tmp_path), "a text"]) == 2
    assert "saved from GPT2ForTokenClassification" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert main(["predict", str(tmp_path), "a text"]) == 2
    assert "no config.json" in capsys.readouterr().err
