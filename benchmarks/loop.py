"""What the training loop costs beside the compiled step.

    python benchmarks/loop.py

Four figures, each beside its target; it exits with 1 if one is missed.

- Host overhead: time of a step in `zoo.training.train`, less what it waits for data, less that of
  the same compiled function called in a bare loop, for a model of one matrix. Rounds of both
  alternate; the medians count.
- Data wait: the part of the time that the loop of configs/default.py waits for batches, as
  metrics.jsonl records it, without the row in which it compiles.
- Checkpoint stall: how long the loop stands still when a checkpoint of configs/default.py, and of a
  state of 100 MB, begins (the median, without the first of a run, which gets the memory for the
  copy), and what the steps cost more, all together, while a thread writes it.
- Second start: from a new process to the end of its first step of configs/default.py, with an empty
  persistent compilation cache and with the one that this left; the smaller of two each.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data import Arrays, Data, train_iterator
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, TrainConfig, train
from zoo.training.config import load_file
from zoo.training.logbook import METRICS, Logbook, read_rows
from zoo.training.loop import Loop
from zoo.training.program import make_program

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "configs/default.py"


class Linear(nn.Module):
    """One matrix of `width` rows and columns, and a head."""

    width: int = 8
    num_classes: int = 4

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return {"images": jax.ShapeDtypeStruct((batch_size, 8), jnp.float32)}

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits."""
        wide = jnp.pad(images, ((0, 0), (0, self.width - images.shape[1])))
        return nn.Dense(self.num_classes, name="head")(nn.Dense(self.width, name="up")(wide))


def linear(width: int = 8, **fields) -> TrainConfig:
    """The smallest run that there is."""
    rng = np.random.default_rng(0)
    examples = Arrays(
        image=rng.standard_normal((256, 8)).astype("f"), label=rng.integers(0, 4, 256)
    )
    return TrainConfig(
        model=Model(f"{__file__}:Linear", {"width": width}),
        task=Classification(),
        data=Data(examples, examples, batch_size=8),
        compilation_cache=None,
        **fields,
    )


def host_overhead(rounds: int = 5, steps: int = 1000) -> tuple[float, float, float]:
    """Seconds a step in the loop, in the compiled function alone, and the difference."""
    config = linear(num_steps=steps, log_every=50)
    program = make_program(config)
    looped, bare = [], []
    with program.context():
        batch = program.place(next(train_iterator(config.data, 0)))
        state, _ = program.step(program.init(0), batch)
    for _ in range(rounds):
        rows = rows_of(config)
        looped += [(1 - row["data_wait"]) / row["steps_per_second"] for row in rows]
        with program.context():
            started = time.perf_counter()
            for _ in range(steps):
                state, output = program.step(state, batch)
            jax.block_until_ready(output)
            bare.append((time.perf_counter() - started) / steps)
    loop, function = statistics.median(looped), statistics.median(bare)
    return loop, function, loop - function


def rows_of(config: TrainConfig) -> list[dict]:
    """The rows of a run's metrics.jsonl that tell of training, without the first."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        train(config, folder)
        rows = [row for row in read_rows(Path(folder) / METRICS) if "steps_per_second" in row]
    return rows[1:]


def data_wait(steps: int = 200) -> float:
    """The part of the time that the default config waits for data."""
    config = dataclasses.replace(load_file(DEFAULT), num_steps=steps, eval_every=0)
    config = dataclasses.replace(config, checkpoint=Checkpointing())
    return statistics.mean(row["data_wait"] for row in rows_of(config))


def checkpoint_stall(config: TrainConfig, steps: int, every: int) -> tuple[float, float]:
    """Seconds that the loop stands still, and that a checkpoint costs until it is written."""
    config = dataclasses.replace(
        config, num_steps=steps, eval_every=0, checkpoint=Checkpointing(every=every)
    )
    ends: list[float] = []
    stalls: list[float] = []
    save, look = Loop.save, Loop.look

    def timed_save(self: Loop) -> None:
        self.look(0)  # the steps under way are not of the checkpoint
        started = time.perf_counter()
        save(self)
        stalls.append(time.perf_counter() - started)

    def timed_look(self: Loop, lag: int) -> None:
        look(self, lag)
        if lag:
            ends.append(time.perf_counter())

    with replaced(save=timed_save, look=timed_look):
        rows_of(config)
    times = np.diff(ends)[every // 2 :]  # without the compilation
    usual = float(np.median(times))
    saves = len(stalls) - 1  # the last is that of the end
    return statistics.median(stalls[1:-1]), float((times - usual).clip(0).sum()) / saves


class replaced:
    """While inside, `Loop` has these methods."""

    def __init__(self, **methods: Callable) -> None:
        self.methods = methods
        self.before = {name: getattr(Loop, name) for name in methods}

    def __enter__(self) -> None:
        for name, method in self.methods.items():
            setattr(Loop, name, method)

    def __exit__(self, *_: object) -> None:
        for name, method in self.before.items():
            setattr(Loop, name, method)


class quiet:
    """While inside, nothing is printed."""

    def __enter__(self) -> None:
        self.stdout, sys.stdout = sys.stdout, open(os.devnull, "w")

    def __exit__(self, *_: object) -> None:
        sys.stdout.close()
        sys.stdout = self.stdout


def second_start(tries: int = 2) -> tuple[float, float]:
    """Seconds to the end of the first step, with an empty cache and with a full one."""
    first, second = [], []
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as cache:
            first.append(start(cache))
            second.append(start(cache))
    return min(first), min(second)


def start(cache: str) -> float:
    """Seconds from a new process to the end of its first step."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": "", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, __file__, "--start", cache, repr(time.time())]
    done = subprocess.run(words, env=env, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def first_step(cache: str, started: float) -> None:
    """In a process of its own: print how long after `started` the first step is done."""
    row = Logbook.row

    def timed_row(self: Logbook, *args: object) -> None:
        row(self, *args)
        print(time.time() - started, flush=True)
        os._exit(0)

    Logbook.row = timed_row
    config = dataclasses.replace(
        load_file(DEFAULT), num_steps=2, log_every=1, compilation_cache=cache
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        first_step(args.start[0], float(args.start[1]))
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} cores, JAX {jax.__version__} on {jax.default_backend()}")
    missed = 0

    def row(what: str, found: float, sign: str, target: float, unit: str, beside: str) -> None:
        nonlocal missed
        met = found < target if sign == "<" else found >= target
        missed += not met
        verdict = "" if met else "  MISSED"
        print(f"{what:28}{found:9.2f} {unit:3} {sign:>2} {target:g}{verdict}", flush=True)
        print(f"{'':28}{beside}", flush=True)

    loop, function, overhead = host_overhead()
    beside = f"{1e3 * loop:.3f} ms in the loop, {1e3 * function:.3f} ms the function alone"
    row("host overhead of a step", 1e3 * overhead, "<", 1, "ms", beside)
    row("data wait, default config", 100 * data_wait(), "<", 2, "%", "of the time")
    for name, config, steps, every in (
        ("default config", load_file(DEFAULT), 160, 40),
        ("100 MB", linear(2880, num_steps=1), 400, 80),
    ):
        stall, cost = checkpoint_stall(config, steps, every)
        beside = f"{1e3 * cost:.0f} ms until it is written, beside the loop"
        row(f"checkpoint stall, {name}", 1e3 * stall, "<", 50, "ms", beside)
    first, second = second_start()
    beside = f"{first:.1f} s with an empty cache, {second:.1f} s with a full one"
    row("second start", first / second, ">=", 2, "x", beside)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
