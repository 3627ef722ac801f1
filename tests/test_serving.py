"""Exported programs run where there is no zoo, at any batch size and length."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.checkpoints import files
from zoo.cli import main
from zoo.serving import export_program, symbolic_inputs

ELSEWHERE = """
import json, sys
import jax, numpy as np, safetensors.numpy
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(f"{folder}/program.jax", "rb").read()))
weights = safetensors.numpy.load_file(f"{folder}/weights.safetensors")
images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
np.save(f"{folder}/logits.npy", program.call(weights, {"images": images}))
assert "zoo" not in sys.modules and "flax" not in sys.modules
print(json.load(open(f"{folder}/program.json"))["inputs"]["images"])
"""


def init(name: str, **fields):
    model = zoo.create(name, **fields)
    inputs = {k: jnp.zeros(s.shape, s.dtype) for k, s in model.example_inputs(1).items()}
    return model, jax.jit(lambda key: model.init(key, **inputs))(jax.random.key(0))


def test_a_program_runs_in_a_process_without_the_zoo(tmp_path, capsys):
    model, variables = init("vit_test", depth=1)
    files.save_safetensors(tmp_path / "w.safetensors", zoo.export(model, variables))
    folder = tmp_path / "program"
    command = ["export", "vit_test", str(folder), "--weights", str(tmp_path / "w.safetensors")]
    assert main([*command, "--set", "depth=1"]) == 0
    assert "uint8[b,32,32,3]" in capsys.readouterr().out
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    how = zoo.info("vit_test").preprocessing
    fed = (images / np.float32(255) - np.float32(how.mean)) / np.float32(how.std)
    want = jax.jit(model.apply)(variables, fed.astype(np.float32))
    got = np.load(folder / "logits.npy")
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_texts_of_any_number_and_length_go_through_one_program():
    model, variables = init("gpt2_test", depth=1)
    assert str(symbolic_inputs(model)["tokens"].shape) == "(b, t)"
    program = export_program(model, variables)
    flat = {"/".join(str(k.key) for k in p): x for p, x in jax.tree.leaves_with_path(variables)}
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (3, 9)), jnp.int32)
    want = jax.jit(model.apply)(variables, tokens)
    got = jax.jit(program.call)(flat, {"tokens": tokens})
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_export_without_weights_is_refused(capsys, tmp_path):
    assert main(["export", "vit_test", str(tmp_path / "x")]) == 2
    assert "--weights" in capsys.readouterr().err


def test_a_length_for_images_is_refused():
    with pytest.raises(ValueError, match="no length"):
        symbolic_inputs(zoo.create("vit_test"), length=4)


def test_sizes_below_one_are_refused():
    model = zoo.create("gpt2_test")
    with pytest.raises(ValueError, match="batch=0 is no size; give 1 or more"):
        symbolic_inputs(model, batch=0)
    with pytest.raises(ValueError, match="length=-3 is no size"):
        symbolic_inputs(model, length=-3)
