"""A run is careful: what it refuses, what it saves first, what it remembers."""

import dataclasses
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from training import tiny

import train as program
from zoo.data import Arrays, Data, ImageFolder
from zoo.errors import ConfigError, DataError, NonFiniteError, StorageError
from zoo.training import Checkpointing, Model, Optimizer, Partition, Stopped, TrainConfig, config
from zoo.training.checks import check_platform
from zoo.training.command_line import parse
from zoo.training.directory import Lock
from zoo.training.evaluation import evaluate_run
from zoo.training.logbook import read_rows
from zoo.training.loop import jump, train

HERE = os.path.dirname(tiny.__file__)
TINY = f"{HERE}/tiny.py"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs that are alike are compiled once in this module."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def small(**changes):
    base = dataclasses.replace(
        tiny.get_config(),
        model=Model(f"{TINY}:Tiny"),
        ema_decay=None,
        num_steps=4,
        eval_every=2,
        checkpoint=Checkpointing(every=2),
    )
    return dataclasses.replace(base, **changes)


def with_data(**fields):
    return dataclasses.replace(small().data, **fields)


@dataclasses.dataclass(frozen=True)
class Odd(tiny.Blobs):
    """Blobs of which one cannot be read, or waits."""

    bad: int = -1
    waits: float = 0.0

    def __getitem__(self, index):
        if index == self.bad:
            raise ValueError(f"Image {index} of this set is torn in two pieces, sadly.")
        time.sleep(self.waits)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def run(tmp_path_factory, compiled_once):
    """A run of four steps, begun from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    _, command = parse(
        [
            TINY,
            "--workdir",
            str(folder),
            "--num-steps",
            "4",
            "--ema-decay",
            "None",
            "--checkpoint.every",
            "2",
            "--eval-every",
            "2",
            "--model.overrides.dropout",
            "0.0",
        ]
    )
    train(command.config, folder, origin=command.origin)
    return folder


# ----------------------------------------------------------------------- before anything is written


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": with_data(train=Odd(size=16, bad=3))}, "Image 3 of this set is torn"),
        ({"data": with_data(eval=Odd("test", 22, bad=5))}, "Image 5 of this set is torn"),
        (
            {"model": Model(f"{TINY}:Tiny", {"num_classes": 3})},
            "create the model with num_classes=4",
        ),
        ({"data": with_data(train=[])}, "no examples"),
        (
            {"checkpoint": Checkpointing(metric="acuracy")},
            "metrics of this task are accuracy, loss",
        ),
        ({"model": Model(f"{TINY}:Tiny", {"image_size": (5, 4)})}, "do not fit together"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        train(small(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: small(optimizer=Optimizer(learning_rate=-1.0)), "learning_rate is -1.0"),
        (lambda: small(optimizer=Optimizer(learning_rate=float("nan"))), "learning_rate is nan"),
        (lambda: small(optimizer=Optimizer(weight_decay=float("inf"))), "weight_decay is inf"),
        (lambda: small(optimizer=Optimizer(b2=1.5)), "b2 is 1.5; it must be between 0 and 1"),
        (lambda: small(optimizer=Optimizer(clip=0.0)), "clip is 0"),
        (lambda: small(data=with_data(batch_size=0)), "batch_size is 0; it must be at least 1"),
        (lambda: small(data=with_data(threads=0)), "threads is 0"),
        (lambda: small(seed=-1), "seed is -1"),
        (lambda: small(partition=Partition(fsdp=0)), "fsdp is 0"),
        (lambda: small(optimizer=Optimizer("adan")), "name is 'adan'; it must be 'adamw', 'adam'"),
        (lambda: small(optimizer=Optimizer(learning_rate="1e-3")), "is '1e-3'; it must be float"),
        (lambda: small(optimizer=Optimizer(accumulate=2.0)), "accumulate is 2.0; it must be int"),
        (lambda: small(precision="fp16"), "precision is 'fp16'; it must be 'float32' or"),
        (lambda: small(freeze="embed.*"), "freeze is 'embed.*'; it must be tuple"),
        (lambda: small(freeze=("*embed",)), r"'\*embed' is no pattern of paths \(nothing to rep"),
        (lambda: small(task="classification"), "task is 'classification'; it must be Task"),
        (lambda: small(optimizer="adam"), "optimizer is 'adam'; it must be Optimizer or dict"),
        (lambda: small(data={"train": 1}), "it must be a zoo.data.Data"),
    ],
)
def test_senseless_numbers_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_platform_that_is_not_here_is_one_sentence(monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu': none\nmore")

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(ConfigError, match="JAX_PLATFORMS is 'tpu', and there is no such device"):
        check_platform()


def test_a_run_directory_serves_one_run_at_a_time(tmp_path):
    with Lock(tmp_path) as lock:
        lock.take()
        with pytest.raises(StorageError, match=f"is in use by process {os.getpid()} of "):
            train(small(), tmp_path)
    with Lock(tmp_path) as lock:
        lock.take()


def test_data_that_a_config_file_finds_wrong_is_one_sentence(tmp_path, capsys):
    rows = [f"2021-01-01 {h:02d}:00,{h}" for h in (0, 1, 3, 2, 4, 5, 6, 7)]
    (tmp_path / "load.csv").write_text("\n".join(["date,load", *rows]))
    (tmp_path / "own.py").write_text(
        "from zoo.data.series import Table, Windows\n"
        "def get_config():\n"
        f"    return Windows(Table({str(tmp_path / 'load.csv')!r}), 'train', 2, 1)\n"
    )
    assert program.main([str(tmp_path / "own.py"), "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert "Line 5 of" in said and "order='sort'" in said and "\n" not in said
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- saved first


def test_a_file_that_breaks_later_costs_nothing(tmp_path):
    broken = small(
        data=with_data(train=Odd(size=64, bad=40)), checkpoint=Checkpointing(), num_steps=8
    )
    with pytest.raises(DataError, match=r"torn in two pieces, sadly\. Step \d is saved"):
        train(broken, tmp_path)
    whole = dataclasses.replace(broken, data=with_data(train=Odd(size=64)))
    assert int(train(whole, tmp_path).state.step) == 8


def test_the_state_is_saved_before_a_loss_that_is_no_number_ends_the_run(tmp_path):
    data = with_data(train=tiny.Blobs(broken_at=40))
    with pytest.raises(NonFiniteError, match=r"the loss is not finite.*Step \d is saved"):
        train(small(data=data, checkpoint=Checkpointing(), num_steps=8), tmp_path)
    assert any((tmp_path / "checkpoints").iterdir())


def test_the_state_is_saved_before_an_evaluation_that_fails(tmp_path):
    data = with_data(eval=Odd("test", 22, bad=17))  # not among the first, which is tried
    with pytest.raises(DataError, match=r"torn in two pieces, sadly\. Step 2 is saved"):
        train(small(data=data, checkpoint=Checkpointing()), tmp_path)
    assert (tmp_path / "checkpoints/2").is_dir()


def test_a_stop_in_an_evaluation_stops_and_the_evaluation_is_made_up_for(tmp_path, capsys):
    slow = small(data=with_data(eval=Odd("test", 22, waits=0.3)))
    timer = threading.Thread(
        target=lambda: (wait_for(tmp_path / "checkpoints/2"), os.kill(os.getpid(), signal.SIGTERM))
    )
    timer.start()
    with pytest.raises(Stopped, match="Stopped and saved at step 2"):
        train(slow, tmp_path)
    timer.join()
    assert not evaluations(tmp_path)
    train(small(data=with_data(eval=Odd("test", 22))), tmp_path)
    assert evaluations(tmp_path) == [2, 4]


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def evaluations(folder):
    return [row["step"] for row in read_rows(folder / "metrics.jsonl") if "eval/loss" in row]


# --------------------------------------------------------------------------------------- going on


def test_a_run_goes_on_with_its_own_flags_and_those_of_now(run):
    _, command = parse([TINY, "--workdir", str(run), "--optimizer.clip", "0.5"])
    assert command.config.num_steps == 4  # of the first command
    assert command.config.optimizer.clip == 0.5
    assert command.config.model.overrides == {"dropout": 0.0}
    assert command.origin["args"][-2:] == ["--optimizer.clip", "0.5"]
    _, command = parse(["--workdir", str(run), "--seed", "5"])
    assert (command.config.num_steps, command.config.seed) == (4, 5)


def test_fewer_steps_than_were_taken_are_refused(run, compiled_once):
    before = (run / "config.json").read_text()
    _, command = parse(["--workdir", str(run), "--num-steps", "3"])
    with pytest.raises(ConfigError, match=r"num_steps is 3, and .* has taken 4 steps; give more"):
        train(command.config, run)
    assert (run / "config.json").read_text() == before


def test_the_config_of_another_run_is_refused(run, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        "from training import tiny\nimport dataclasses\nfrom zoo.training import Model\n"
        "def get_config():\n    c = tiny.get_config()\n"
        "    return dataclasses.replace(c, model=Model('swin_test'))\n"
    )
    before = (run / "config.json").read_text()
    with pytest.raises(ConfigError, match="is a run of another network or task than"):
        parse([str(other), "--workdir", str(run)])
    assert (run / "config.json").read_text() == before


def test_another_batch_size_neither_repeats_nor_leaves_out(tmp_path, monkeypatch):
    seen = []
    read = tiny.Blobs.__getitem__

    def noted(self, index):
        seen.extend([index] * (self.split == "train"))
        return read(self, index)

    source = tiny.Blobs(size=96)
    train(small(data=with_data(train=source, batch_size=16)), tmp_path)
    monkeypatch.setattr(tiny.Blobs, "__getitem__", noted)
    train(small(data=with_data(train=source, batch_size=8), num_steps=8), tmp_path)
    extra = json.loads((tmp_path / "checkpoints/8/extra/0.json").read_text())
    assert extra["examples"] == 4 * 16 + 4 * 8
    assert len(set(seen[:32])) == 32  # the rest of the epoch, each once


def test_a_schedule_that_leaps_is_said():
    old = small(optimizer=Optimizer(learning_rate=0.1, schedule="one_cycle"), num_steps=12)
    new = dataclasses.replace(old, num_steps=48)
    assert "The learning rate goes from" in jump(config.to_json(old), new, 12)
    assert jump(config.to_json(old), old, 6) is None


def test_data_that_has_moved_is_a_flag_away(tmp_path):
    from PIL import Image

    (tmp_path / "a" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a/cat/x.png")
    source = ImageFolder(tmp_path / "a")
    (tmp_path / "run").mkdir()
    config.save(small(data=with_data(train=source, eval=source)), tmp_path / "run/config.json")
    (tmp_path / "a").rename(tmp_path / "b")
    args = ["--workdir", str(tmp_path / "run")]
    with pytest.raises(
        ConfigError, match=r"no folder .* If it has moved, give --data\.train\.path"
    ):
        parse(args)
    new = str(tmp_path / "b")
    _, command = parse([*args, "--data.train.path", new, f"--data.eval.path={new}"])
    assert len(command.config.data.train) == 1


def test_every_field_of_data_and_task_is_set_by_its_path():
    _, command = parse(
        [
            TINY,
            "--data.eval.size",
            "9",
            "data.batch_size=8",
            "--data.train.split=x",
            "--task.label-smoothing",
            "0.1",
            "--data.eval-batch-size",
            "None",
        ]
    )
    data = command.config.data
    assert (data.eval.size, data.batch_size, data.train.split) == (9, 8, "x")
    assert data.eval_batch_size is None
    assert command.config.task.label_smoothing == 0.1
    for flag, said in (
        ("--data.eval.sise=3", r"no field --data\.eval\.sise; did you mean --data\.eval\.size"),
        ("--data.eval.size=many", "give a whole number"),
        ("--data.eval=3", "set one of its fields: split, size"),
        ("--optimizer.freeze=x", "did you mean --freeze"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse([TINY, flag])


def test_own_runs_are_fine_tuned(run, tmp_path, capsys):
    begin = Model(f"{TINY}:Tiny", {"num_classes": 6}, checkpoint=str(run))
    with pytest.raises(ConfigError, match=r"another network \(of another shape: .*head.*adapt"):
        train(small(model=begin), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    adapted = dataclasses.replace(begin, adapt=True)
    steps = small(model=adapted, num_steps=1, optimizer=Optimizer("sgd", 1e-9, b1=0.0))
    result = train(steps, tmp_path / "b")
    assert "leaves are taken; of another shape:" in capsys.readouterr().out
    from zoo.checkpoints.runs import load_variables

    old, new = load_variables(run)["params"], result.state.params
    np.testing.assert_allclose(new["embed"]["kernel"], old["embed"]["kernel"], atol=1e-6)
    assert new["head"]["kernel"].shape[-1] == 6


# ------------------------------------------------------------------------------------ what is told


def test_the_test_is_measured_once_and_again_by_eval(tmp_path):
    config = small(data=with_data(test=tiny.Blobs("test", 30)))
    metrics = train(config, tmp_path).metrics
    assert {"accuracy", "test/accuracy"} <= set(metrics)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "test/loss" in row]
    assert [row["step"] for row in rows] == [4]
    found, step = evaluate_run(tmp_path, config=config)
    assert step == 4 and set(found) == set(metrics)
    np.testing.assert_allclose(found["test/loss"], metrics["test/loss"], rtol=1e-6)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["metric"], scores["mode"]) == ("accuracy", "max")
    assert set(scores["steps"]) == {"2", "4"}


def test_arrays_in_memory_say_how_to_give_them_again(tmp_path):
    arrays = Arrays(image=np.zeros((16, 4, 4, 1), "f"), label=np.zeros(16, "i4"))
    small_run = small(data=Data(arrays, arrays, batch_size=16), num_steps=1)
    assert isinstance(small_run, TrainConfig)
    train(small_run, tmp_path)
    with pytest.raises(ConfigError, match=r"in memory.*evaluate_run\(RUN, config=\.\.\.\)"):
        evaluate_run(tmp_path)
    assert evaluate_run(tmp_path, config=small_run)[1] == 1
