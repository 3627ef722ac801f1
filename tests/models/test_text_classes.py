"""Decoders that tell classes of whole texts, as transformers' `ForSequenceClassification`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import filled

import zoo
from zoo.checkpoints import files
from zoo.prediction import of_model
from zoo.tasks import Classification

NAMES = ("gpt2_test", "llama_test", "opt_test")
TOKENS = jax.random.randint(jax.random.key(0), (2, 10), 0, 97)


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_read_off_the_last_token_of_a_text(name):
    model = zoo.create(name, num_classes=3, depth=1)
    variables = filled(model)
    run = jax.jit(model.apply)
    mask = jnp.ones((2, 10), bool).at[1, 7:].set(False)
    got = run(variables, TOKENS, mask)
    assert got.shape == (2, 3)
    cut = jax.jit(model.apply)(variables, TOKENS[1:, :7])
    np.testing.assert_allclose(got[1], cut[0], rtol=1e-4, atol=1e-5)
    other = run(variables, TOKENS.at[1, 7:].set(5), mask)
    np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)
    assert np.abs(got[0] - run(variables, TOKENS.at[0, -1].add(1) % 97, mask)[0]).max() > 1e-3


def test_a_model_of_classes_says_no_tokens():
    model = zoo.create("gpt2_test", num_classes=3)
    with pytest.raises(ValueError, match="num_classes=3 and says no tokens"):
        model.apply(filled(model), model.init_state(1, 4), TOKENS[:1, :2], method="step")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2_test", dict(model_type="gpt2", n_head=4, n_embd=32, n_layer=2, n_positions=64)),
        (
            "llama_test",
            dict(model_type="llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
                 num_hidden_layers=2, intermediate_size=48),
        ),
    ],
)  # fmt: skip
def test_a_folder_of_a_classifier_keeps_its_trained_classes(tmp_path, name, config):
    kind = {"gpt2": "GPT2", "llama": "Llama"}[config["model_type"]]
    config |= dict(
        architectures=[f"{kind}ForSequenceClassification"], vocab_size=97,
        id2label={"0": "bad", "1": "good"},
    )  # fmt: skip
    model = zoo.create(name, num_classes=2, tie_embeddings=True)
    variables = filled(model)
    files.save_safetensors(tmp_path / "model.safetensors", zoo.export(model, variables))
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, got = zoo.load(tmp_path)
    assert loaded.num_classes == 2
    jax.tree.map(np.testing.assert_array_equal, got, variables)
    predictor = of_model(None, tmp_path)
    assert isinstance(predictor.task, Classification)
    assert predictor.facts["classes"] == ["bad", "good"]
    batch = {"tokens": np.asarray(TOKENS), "mask": np.ones((2, 10), np.int32)}
    assert predictor(batch)["probabilities"].shape == (2, 2)
    trunk, _, report = zoo.load(tmp_path, num_classes=0, return_report=True)
    assert trunk.num_classes == 0 and report.aside == ("score.weight",)
