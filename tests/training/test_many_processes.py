"""Runs of several processes, joined by `jax.distributed` over loopback."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training import tiny

from zoo.checkpoints.runs import read_manifest
from zoo.errors import ConfigError
from zoo.training import distributed
from zoo.training.config import load_file
from zoo.training.logbook import read_rows
from zoo.training.loop import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOST = (distributed.EXIT_LOST, -signal.SIGABRT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the processes of this module."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def begin(cache, tmp_path_factory):
    """Starts the processes of a run; `events` says what goes wrong in which."""
    started = []

    def begin(run, count, *args, events=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        logs, events = tmp_path_factory.mktemp("logs"), dict(events)
        processes = []
        if count > 1:
            args = (*args, f"--partition.fsdp={count}", "--partition.fsdp-min-size=64")
        for index in range(count):
            env = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": f"{ROOT}:{HERE.parent}",
            }
            if count > 1:
                values = (address, str(count), str(index))
                env |= dict(zip(distributed.EXPLICIT, values, strict=True))
            words = [HERE / "driver.py", events.get(index, "none"), HERE / "many.py"]
            words += ["--workdir", run, *args]
            with open(logs / f"{index}.out", "w") as out, open(logs / f"{index}.err", "w") as err:
                process = subprocess.Popen(
                    [sys.executable, *map(str, words)], env=env, stdout=out, stderr=err
                )
            process.out, process.err = logs / f"{index}.out", logs / f"{index}.err"
            processes.append(process)
        started.extend(processes)
        return processes

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def complete(begin):
    """Runs to the end; every process must succeed."""

    def complete(run, count, *args, events=()):
        processes = begin(run, count, *args, events=events)
        assert [p.wait(120) for p in processes] == [0] * count, said(processes)
        return processes

    return complete


def said(processes):
    return "\n".join(p.err.read_text()[-1500:] for p in processes)


def curve(run, kind="train/loss"):
    return {row["step"]: row[kind] for row in read_rows(run / "metrics.jsonl") if kind in row}


def digests(run, step):
    """What the arrays of a checkpoint are, to the bit."""
    return read_manifest(run / "checkpoints" / str(step))


def same_curve(found, expected):
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, this one, and the examples that it read."""
    home = tmp_path_factory.mktemp("alone")
    read = tiny.Blobs.__getitem__

    def noted(self, index):
        if self.split == "train":
            with open(home / "reads", "a") as file:
                file.write(f"{index}\n")
        return read(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.Blobs, "__getitem__", noted)
        train(load_file(HERE / "many.py"), home / "run")
    return home


@pytest.fixture(scope="module")
def pair(tmp_path_factory, complete):
    """The same run by two processes."""
    home = tmp_path_factory.mktemp("pair")
    events = {i: f"reads:{home / f'reads{i}'}" for i in range(2)}
    processes = complete(home / "run", 2, events=events)
    return home, processes


def test_two_processes_learn_what_one_does(alone, pair):
    found, expected = pair[0] / "run", alone / "run"
    same_curve(curve(found), curve(expected))
    same_curve(curve(found, "eval/loss"), curve(expected, "eval/loss"))


def test_each_process_reads_its_own_share(alone, pair):
    one, *two = (
        (home / name).read_text().split()
        for home, name in ((alone, "reads"), (pair[0], "reads0"), (pair[0], "reads1"))
    )
    assert not set(two[0]) & set(two[1])  # nor of what was read ahead
    used = 12 * 16  # steps, batch
    assert set(two[0][: used // 2]) | set(two[1][: used // 2]) == set(one[:used])
    assert len(set(one[:used])) == used


def test_the_first_process_logs_and_all_save(pair):
    run, (first, second) = pair[0] / "run", pair[1]
    assert "held out" in first.out.read_text()
    assert not [line for line in second.out.read_text().splitlines() if "Gloo" not in line]
    assert len(list((run / "tensorboard").iterdir())) == 1
    for step in (4, 8, 12):
        written = {p.name for p in (run / f"checkpoints/{step}/manifest").glob("?.json")}
        assert written == {"0.json", "1.json"}
        assert len(digests(run, step)["params/mlp/up/kernel"]["shards"]) == 2


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_resumes_to_the_bit(pair, tmp_path, begin):
    run = tmp_path / "run"
    other, victim = begin(run, 2, events={1: "die:7"})
    assert victim.wait(120) == -signal.SIGKILL
    died = time.monotonic()
    assert other.wait(60) in LOST
    assert time.monotonic() - died < 45  # 20 where the cores are free
    if other.returncode == distributed.EXIT_LOST:
        assert "Another process of this run is gone" in other.err.read_text()
    processes = begin(run, 2)
    assert [p.wait(120) for p in processes] == [0, 0], said(processes)
    assert "after step 4" in processes[0].out.read_text()
    assert curve(run) == curve(pair[0] / "run")
    assert digests(run, 12) == digests(pair[0] / "run", 12)


@pytest.mark.slow
def test_one_of_four_is_stopped_and_all_save_one_step_for_two_and_for_one(
    alone, tmp_path, begin, complete
):
    run = tmp_path / "four"
    processes = begin(run, 4, events={2: "term:6"})
    assert [p.wait(120) for p in processes] == [75] * 4, said(processes)
    last = max(int(p.name) for p in (run / "checkpoints").iterdir())
    assert 5 <= last < 12
    assert all(f"saved at step {last} of 12" in p.err.read_text() for p in processes)
    for count in (2, 1):
        copy = tmp_path / f"on{count}"
        shutil.copytree(run, copy)
        first, *_ = complete(copy, count)
        assert f"after step {last}" in first.out.read_text()
        same_curve(curve(copy), curve(alone / "run"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not"),
        (dict(zip(distributed.EXPLICIT, ("a:1", "two", "0"), strict=True)), "is 'two'"),
        (dict(zip(distributed.EXPLICIT, ("a:1", "2", "2"), strict=True)), "from 0 to 1"),
        (dict(zip(distributed.EXPLICIT, ("a", "2", "1"), strict=True)), "HOST:PORT"),
    ],
)
def test_variables_that_do_not_fit_are_said(monkeypatch, variables, message):
    for name in distributed.EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        distributed.initialize()


@pytest.mark.slow
def test_a_frozen_process_ends_the_others_after_its_heartbeats_fail(tmp_path, begin):
    processes = begin(tmp_path / "run", 2, "--num-steps=2000", "--log-every=10")
    wait_for_rows(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(2 * distributed.HEARTBEAT_SECONDS) in LOST


@pytest.mark.slow
def test_what_all_refuse_ends_all_with_the_same_code(tmp_path, begin):
    processes = begin(tmp_path / "run", 2, "--data.batch-size=15")
    assert [p.wait(60) for p in processes] == [2, 2]
    assert all("batch_size" in p.err.read_text() for p in processes)


@pytest.mark.slow
def test_random_kills_over_a_hundred_steps_lose_nothing(tmp_path, begin, complete):
    args = ("--num-steps=100", "--checkpoint.every=10", "--eval-every=50")
    complete(tmp_path / "whole", 2, *args)
    run, draw, codes = tmp_path / "disturbed", random.Random(0), []
    while codes[-1:] != [[0, 0]]:
        processes = begin(run, 2, *args, events={0: "slow:0.1", 1: "slow:0.1"})
        wait_for_rows(run, draw.randint(1, 40), processes)
        number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        draw.choice(processes).send_signal(number)
        codes.append([p.wait(240) for p in processes])
        assert all(code in (0, 75, *LOST, -signal.SIGKILL) for code in codes[-1]), said(processes)
        assert len(codes) < 40
    assert len(codes) > 3  # three kills or more
    assert curve(run) == curve(tmp_path / "whole")
    assert digests(run, 100) == digests(tmp_path / "whole", 100)


def wait_for_rows(run, count, processes):
    """Returns when the run has logged so many more steps, or has ended."""
    before = len(curve(run))
    while len(curve(run)) < before + count and all(p.poll() is None for p in processes):
        time.sleep(0.05)
