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


SLOW = pytest.mark.slow
BLOCKS = [  # name, fields, tokens of a block, blocks
    ("combiner_test", {"span": 4, "depth": 1}, 4, (2, 3)),
    pytest.param("combiner_test", {"kind": "axial", "span": 4}, 4, (2, 5), marks=SLOW),
    pytest.param("combiner_test", {"kind": "axial_rows", "span": 4}, 4, (2, 5), marks=SLOW),
    pytest.param("reformer_test", {"num_buckets": 4}, 8, (2, 4), marks=SLOW),
    pytest.param("routing_transformer_test", {"max_length": 256}, 64, (1, 3), marks=SLOW),
    pytest.param("urpe_test", {}, 1, (5, 37), marks=SLOW),
    pytest.param("nprf_test", {}, 1, (5, 37), marks=SLOW),
    pytest.param("nprf_test", {"causal": False}, 1, (2, 64), marks=SLOW),
    pytest.param("ebt_test", {}, 1, (3, 9), marks=SLOW),
    pytest.param("longformer_test", {}, 1, (3, 40), marks=SLOW),
    pytest.param("linformer_test", {}, 1, (3, 40), marks=SLOW),
    pytest.param("performer_test", {}, 1, (3, 40), marks=SLOW),
]


@pytest.mark.parametrize(("name", "fields", "block", "counts"), BLOCKS)
def test_texts_of_whole_blocks_go_through_one_program(name, fields, block, counts):
    model, variables = init(name, **fields)
    shape = str(symbolic_inputs(model)["tokens"].shape)
    assert shape == ("(b, t)" if block == 1 else f"(b, {block}*t)")
    program = export_program(model, variables)
    flat = {"/".join(str(k.key) for k in p): x for p, x in jax.tree.leaves_with_path(variables)}
    for batch, count in enumerate(counts, 1):
        random = np.random.default_rng(count)
        inputs = {}
        for key, one in model.example_inputs(batch, length=block * count).items():
            most = 90 if key == "tokens" else 2
            inputs[key] = jnp.asarray(random.integers(1, most, one.shape), one.dtype)
        inputs = {k: x if k == "tokens" else jnp.ones_like(x) for k, x in inputs.items()}
        want = jax.jit(model.apply)(variables, **inputs)
        got = jax.jit(program.call)(flat, inputs)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("combiner_test", {"span": None}, "create it with span=N"),
        ("combiner_test", {"kind": "logsparse"}, "one program takes one length"),
        ("reformer_test", {"num_buckets": None}, "create it with num_buckets=N"),
    ],
)
def test_programs_that_depend_on_the_length_say_what_to_do(name, fields, said):
    with pytest.raises(ValueError, match=said):
        symbolic_inputs(zoo.create(name, **fields))
    assert symbolic_inputs(zoo.create(name, **fields), length=16)["tokens"].shape[1] == 16


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
