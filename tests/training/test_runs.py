"""Checkpoints on disk: every bit counts."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import zoo
from zoo.checkpoints import runs
from zoo.checkpoints.mismatch import CheckpointMismatch
from zoo.checkpoints.runs import Checkpoints, load_run, load_variables
from zoo.errors import CheckpointBroken


def parts(scale=1.0):
    return {
        "params": {"mlp": {"kernel": scale * jnp.arange(12.0).reshape(3, 4)}},
        "collections": {"batch_stats": {"mean": jnp.full(4, scale, ml_dtypes.bfloat16)}},
        "optimizer": {"0": {"count": jnp.int32(7)}},
        "ema": {},
    }


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 1 to 4 with the best one second; two latest and the best stay."""
    run = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(run, keep=2, keep_best=1, metric="accuracy")
    for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        checkpoints.save(step, parts(step), {"iterator": {"at": step}}, {"accuracy": accuracy})
    checkpoints.close()
    return run


def test_the_latest_and_the_best_stay(run):
    assert runs.steps_of(run / "checkpoints") == [2, 3, 4]


def test_what_was_saved_comes_back_in_kind(run):
    found, extra = Checkpoints(run).restore(abstract())
    jax.tree.map(np.testing.assert_array_equal, found, {k: v for k, v in parts(4).items() if v})
    assert found["collections"]["batch_stats"]["mean"].dtype == jnp.bfloat16
    assert extra["step"] == 4
    assert extra["iterator"] == {"at": 4}
    assert extra["versions"]["jax"] == jax.__version__


def test_variables_of_a_run_a_folder_and_a_step(run):
    for place in (run, run / "checkpoints", run / "checkpoints/4"):
        variables = load_variables(place)
        assert set(variables) == {"params", "batch_stats"}
        assert variables["params"]["mlp"]["kernel"][2, 3] == 44
    assert load_variables(run, step=2)["params"]["mlp"]["kernel"][2, 3] == 22
    with pytest.raises(FileNotFoundError, match="has no step 1; it has 2, 3, 4"):
        load_variables(run, step=1)


def test_one_flipped_bit_in_any_file_is_found(run, tmp_path):
    step = tmp_path / "4"
    shutil.copytree(run / "checkpoints/4", step)
    files = [p for p in sorted(step.rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[len(whole) // 2] ^= 1
        file.write_bytes(broken)
        with pytest.raises(CheckpointBroken, match="is damaged"):
            load_run(step)
        file.write_bytes(whole)
    load_run(step)


def test_arrays_are_checked_even_without_digests_of_files(run, tmp_path):
    step = tmp_path / "4"
    shutil.copytree(run / "checkpoints/4", step)
    (step / "FILES.json").unlink()
    load_run(step)
    manifest = step / "manifest/0.json"
    digest = runs.read_manifest(step)["params/mlp/kernel"]["shards"][0]["digest"]
    manifest.write_text(manifest.read_text().replace(digest, digest[::-1]))
    with pytest.raises(CheckpointBroken, match="params/mlp/kernel is not what was saved"):
        load_run(step)


def test_broken_steps_are_set_aside_until_one_is_whole(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints/4/FILES.json").write_text("{}")
    (copy / "checkpoints/3/extra/0.json").unlink()
    said = []
    _, extra = Checkpoints(copy, say=said.append).restore(abstract())
    assert extra["step"] == 2
    assert len(said) == 2
    assert all("damaged" in s for s in said)
    assert {p.name for p in (copy / "set_aside").iterdir()} == {"3", "4"}
    for step in Checkpoints(copy).steps():
        (copy / f"checkpoints/{step}/FILES.json").write_text("{}")
    assert Checkpoints(copy, say=said.append).restore(abstract()) is None
    assert said[-1].endswith("is whole: it begins anew at step 0.")


def test_a_checkpoint_of_another_model_is_refused_and_left_in_place(run):
    other = abstract()
    other["params"]["mlp"]["kernel"] = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    other["params"]["head"] = {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(CheckpointMismatch) as error:
        Checkpoints(run).restore(other)
    assert error.value.missing == ("params/head/bias",)
    assert error.value.misshapen[0].name == "params/mlp/kernel"
    assert runs.steps_of(run / "checkpoints") == [2, 3, 4]


def test_zoo_load_reads_a_run(tmp_path):
    model = zoo.create("swin_test")
    inputs = {k: jnp.zeros(s.shape, s.dtype) for k, s in model.example_inputs().items()}
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, {"params": variables["params"]}, {})
    checkpoints.close()
    _, loaded = zoo.load("swin_test", tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    with pytest.raises(CheckpointMismatch, match=r"Misshapen.*head"):
        zoo.load("swin_test", tmp_path / "run", num_classes=3)
