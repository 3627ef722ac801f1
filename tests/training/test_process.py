"""Runs as real processes: killed, stopped, damaged, moved to other devices, out of room."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import train as program
from zoo.errors import StorageError
from zoo.training.config import load_file
from zoo.training.logbook import read_rows
from zoo.training.loop import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = str(HERE / "tiny.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the processes of this module."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def start(cache):
    def start(run, *args, event="none", devices=1):
        flags = f"{os.environ.get('XLA_FLAGS', '')} "
        env = {
            **os.environ,
            "XLA_FLAGS": flags + f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": f"{ROOT}:{HERE.parent}",
        }
        words = [HERE / "driver.py", event, CONFIG, "--workdir", run, *args]
        return subprocess.run(
            [sys.executable, *map(str, words)], env=env, capture_output=True, text=True, check=False
        )

    return start


def curve(run, kind="train/loss"):
    return {row["step"]: row[kind] for row in read_rows(run / "metrics.jsonl") if kind in row}


def steps(run):
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = start(run)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_leaves_checkpoints_metrics_events_config_and_a_picture(whole):
    assert steps(whole) == [4, 8, 12]
    assert list(curve(whole)) == list(range(1, 13))
    assert list(curve(whole, "eval/accuracy")) == [6, 12]
    assert list((whole / "tensorboard").glob("events*"))
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole / "config.json").read_text())["num_steps"] == 12


def test_a_run_killed_in_the_middle_of_a_save_resumes_bit_for_bit(whole, tmp_path, start):
    run = tmp_path / "killed"
    killed = start(run, event="kill:8")
    assert killed.returncode == -signal.SIGKILL
    assert list((run / "checkpoints").glob("8*tmp*")), "it did not die inside the save"
    resumed = start(run)
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 4" in resumed.stdout
    assert curve(run) == curve(whole)
    assert curve(run, "eval/loss") == curve(whole, "eval/loss")
    assert steps(run) == [4, 8, 12]


def test_a_stopped_run_on_two_devices_resumes_on_one(whole, tmp_path, start, capsys):
    run = tmp_path / "two"
    cut = ("--partition.fsdp=2", "--partition.fsdp_min_size=64")
    stopped = start(run, *cut, event="term:6", devices=2)
    assert stopped.returncode == 75, stopped.stderr
    assert "saved at step 6" in stopped.stderr
    assert steps(run) == [4, 6]
    assert max(curve(run)) == 6
    train(load_file(CONFIG), run)
    said = capsys.readouterr().out
    assert "after step 6" in said
    assert "partition.fsdp: 2 -> 1" in said
    expected, found = curve(whole), curve(run)
    np.testing.assert_allclose(
        [found[s] for s in expected], list(expected.values()), rtol=1e-5, atol=1e-6
    )
    assert list(curve(run, "eval/loss")) == [6, 12]


def test_a_flipped_bit_is_found_and_the_step_before_is_used(whole, tmp_path, capsys):
    run = tmp_path / "flipped"
    shutil.copytree(whole, run)
    files = (p for p in (run / "checkpoints/12/params").rglob("*") if p.is_file())
    data = max(files, key=lambda p: p.stat().st_size)
    flip(data, data.stat().st_size // 2)
    train(load_file(CONFIG), run)
    said = capsys.readouterr().out.replace("\n", "")
    assert "WARNING" in said
    assert "checkpoints/12 is damaged" in said
    assert "after step 8" in said
    assert (run / "set_aside/12").is_dir()
    assert steps(run) == [4, 8, 12]
    expected, found = curve(whole), curve(run)
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-5)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_eval_gives_the_metric_of_the_run(whole, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert evaluation.main([str(whole), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["step"] == 12
    assert result["accuracy"] == curve(whole, "eval/accuracy")[12]
    np.testing.assert_allclose(result["loss"], curve(whole, "eval/loss")[12], rtol=1e-6)
    assert evaluation.main([str(whole), "--min-accuracy", "1.1"]) == 1


def one_sentence(done):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_disk_that_is_full_is_said_before_it_is_written(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match=r"Checkpoint 4 could not be written.*no space left"):
        train(load_file(CONFIG), tmp_path / "run")


@pytest.mark.slow
def test_a_disk_without_room_ends_in_one_sentence(tmp_path, start):
    done = start(tmp_path / "run", event="limit:6000")
    assert done.returncode == 1
    said = one_sentence(done)
    assert "Checkpoint 4 could not be written" in said
    assert "file too large" in said


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence(tmp_path, start):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        done = start(disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 1
    assert "no space left on device" in one_sentence(done)


def test_a_directory_that_cannot_be_written_ends_in_one_sentence():
    with pytest.raises(StorageError, match="Cannot write to /proc/run"):
        train(load_file(CONFIG), "/proc/run")


def test_a_wrong_field_ends_in_one_sentence(tmp_path, capsys):
    words = [CONFIG, "--workdir", str(tmp_path / "run"), "--optimizer.larning-rate", "1"]
    assert program.main(words) == 2
    said = capsys.readouterr().err.strip()
    assert "did you mean --optimizer.learning-rate?" in said and "\n" not in said
    assert not (tmp_path / "run").exists()
