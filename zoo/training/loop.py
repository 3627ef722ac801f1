"""The training loop: from a config to a run directory that can be continued."""

import collections
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point, sync_global_devices

from zoo.checkpoints.runs import Checkpoints, cause
from zoo.errors import ConfigError, StorageError, TrainingError
from zoo.training import config as configs
from zoo.training import distributed
from zoo.training.config import TrainConfig
from zoo.training.guard import Guard, watched
from zoo.training.logbook import Logbook
from zoo.training.prefetch import Prefetch
from zoo.training.profile import Profile
from zoo.training.program import Program, make_program
from zoo.training.start import completed, first_state
from zoo.training.state import State
from zoo.training.step import turns

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop (SIGTERM, SIGINT) and saved: give the same command
again to continue. It is EX_TEMPFAIL of sysexits.h."""

LAG = 2  # steps that run on the devices while the host looks at an earlier one's output


class Stopped(TrainingError):
    """The run was asked to stop; it saved, and can be continued."""


@dataclass(frozen=True)
class Result:
    """What a run ends with: the last evaluation, the state and the run directory."""

    metrics: dict[str, float]
    state: State
    workdir: Path


def train(config: TrainConfig, workdir: str | os.PathLike, *, profile: bool = False) -> Result:
    """Train, or continue the run that is in `workdir`.

    Args:
      config: what to do.
      workdir: the run directory; made if it is not there.
      profile: write a trace of ten steps.

    Raises:
      ConfigError: if the config does not fit the model, the devices or the data.
      StorageError: if the run directory cannot be written.
      NonFiniteError: if the guard gives up.
      Stopped: after SIGTERM or SIGINT, when all is saved.
      Lost: if another process of the run is gone.
    """
    distributed.initialize()
    distributed.check_joined()
    use_compilation_cache(config.compilation_cache)
    run = Path(workdir).resolve()
    with distributed.together(), storage(run):
        prepare(run, config)
        logbook = Logbook(run, config.num_steps, active=jax.process_index() == 0)
        program = make_program(config)
        with ExitStack() as stack:
            stack.callback(logbook.close)
            stack.enter_context(program.context())
            return Loop(config, run, program, logbook, profile).run_to_end()


class Loop:
    """One run: its state, its data and where they are kept."""

    def __init__(
        self, config: TrainConfig, run: Path, program: Program, logbook: Logbook, profile: bool
    ) -> None:
        """Restore the newest checkpoint, or begin."""
        from zoo.data import train_iterator

        self.config, self.run, self.program, self.logbook = config, run, program, logbook
        self.profile = profile
        self.checkpoints = Checkpoints(
            run,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            metric=config.checkpoint.metric,
            mode=config.checkpoint.mode,
            say=lambda text: logbook.say(f"WARNING: {text}", style="bold red"),
        )
        try:
            self.iterator = train_iterator(config.data, config.seed, *program.share())
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from None
        self.window: dict[str, list[float]] = {}
        self.evaluated: dict[str, float] = {}
        self.saved = self.evaluated_at = -1
        restored = self.restore()
        if restored is None:
            self.step = 0
            self.state = first_state(program)
        else:
            self.state, extra = restored
            self.step = self.saved = extra["step"]
            self.window = extra["window"]
            self.iterator.set_state(extra["iterator"])
            logbook.say(f"Continuing {run} after step {self.step}.")
        names = watched(turns(config.task.phases), program.assigned)
        self.guard = Guard(config.guard, config.guard_limit, names)
        self.outputs: collections.deque = collections.deque()
        self.clock = (time.perf_counter(), self.step, 0.0)

    def run_to_end(self) -> Result:
        """The loop itself."""
        config, started = self.config, time.perf_counter()
        self.logbook.start(self.step)
        with ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            self.batches = Prefetch(self.iterator, self.program.place, config.prefetch)
            stack.callback(self.batches.close)
            profile = None
            if self.profile and distributed.is_first():
                profile = Profile(self.run / "profile", self.step, self.logbook.say)
                stack.callback(lambda: profile.stop(self.step))
            asked_to_stop = stack.enter_context(stop_signals())
            self.clock = (time.perf_counter(), self.step, 0.0)
            while self.step < config.num_steps:
                with profile.step(self.step, self.state) if profile else nullcontext():
                    self.state, output = self.program.step(self.state, next(self.batches))
                self.step += 1
                self.outputs.append((self.step, output))
                self.look(LAG)
                if due(self.step, config.eval_every, config.num_steps):
                    self.evaluate()
                if due(self.step, config.checkpoint.every, config.num_steps):
                    self.save()
                if asked_to_stop(self.step) and self.step < config.num_steps:
                    self.save()
                    self.checkpoints.wait()
                    self.logbook.picture()
                    raise Stopped(
                        f"Stopped and saved at step {self.step} of {config.num_steps}; give the "
                        f"same command with --workdir {self.run} to continue."
                    )
            if not self.evaluated:
                self.evaluate()
        self.logbook.picture()
        self.logbook.close()
        self.logbook.table(time.perf_counter() - started)
        return Result(self.evaluated, self.program.to_global(self.state), self.run)

    # ------------------------------------------------------------------------ parts of a step

    def look(self, lag: int) -> None:
        """Take in the outputs of all but the last `lag` steps; act on bad ones; write rows."""
        while len(self.outputs) > lag:
            step, output = self.outputs.popleft()
            output = self.program.fetch(output)
            said = self.guard.look(step, int(output.bad))
            if said is not None:
                self.logbook.say(f"WARNING: {said}", style="bold red")
                if self.config.guard == "rollback":
                    return self.roll_back()
            else:
                for name, mean in output.means.items():
                    self._count(f"train/{name}", mean.total, mean.count)
                self._count("grad_norm", output.grad_norm, 1)
                self._count("learning_rate", output.learning_rate, 1)
            if due(step, self.config.log_every, self.config.num_steps):
                self._write_row(step)
        return None

    def _count(self, name: str, total: Any, count: Any) -> None:
        sums = self.window.setdefault(name, [0.0, 0.0])
        sums[0] += float(total)
        sums[1] += float(count)

    def _write_row(self, step: int) -> None:
        now, (then, before, waited) = time.perf_counter(), self.clock
        self.clock = (now, step, self.batches.waited)
        means = {name: total / max(count, 1.0) for name, (total, count) in self.window.items()}
        speed = (step - before) / max(now - then, 1e-9)
        timing = {
            "steps_per_second": speed,
            "examples_per_second": speed * self.config.data.batch_size,
            "data_wait": (self.batches.waited - waited) / max(now - then, 1e-9),
        }
        self.window = {}
        self.logbook.row(step, {**means, **timing})
        self.logbook.progress(step, {"train/loss": first_loss(means), **timing})

    def evaluate(self) -> None:
        """Measure the held-out examples, every one once, and run the evaluators that are due."""
        self.look(0)
        started = time.perf_counter()
        self.evaluated = self.program.evaluate(self.state.variables())
        self.evaluated |= self.run_evaluators()
        self.logbook.row(self.step, {f"eval/{k}": v for k, v in self.evaluated.items()})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in self.evaluated.items())
        self.logbook.say(f"step {self.step}  held out: {shown}")
        lost = time.perf_counter() - started
        self.clock = (self.clock[0] + lost, *self.clock[1:])
        self.evaluated_at = self.step

    def run_evaluators(self) -> dict[str, float]:
        """What the evaluators say that are due at this step; of several processes none is run."""
        wanted = [
            e for e in self.config.evaluators if due(self.step, e.every, self.config.num_steps)
        ]
        if not wanted or jax.process_count() > 1:
            return {}
        variables = self.program.to_global(self.state).variables()
        found: dict[str, float] = {}
        for evaluator in wanted:
            found |= evaluator.run(self.program, variables, self.config.data, self.run)
        return found

    def save(self) -> None:
        """Start to write a checkpoint of this step."""
        self.look(0)
        if self.step == self.saved:
            return
        extra = {
            "iterator": self.batches.state,
            "window": self.window,
            "config": configs.to_json(self.config),
        }
        fresh = self.evaluated_at == self.step
        parts = self.program.to_global(self.state).to_parts()
        self.checkpoints.save(self.step, parts, extra, self.evaluated if fresh else None)
        self.saved = self.step

    def restore(self) -> tuple[State, dict[str, Any]] | None:
        """State and extra of the newest checkpoint that is whole."""
        try:
            found = self.checkpoints.restore(self.program.abstract.to_parts())
        except ValueError as error:  # CheckpointMismatch
            raise ConfigError(str(error)) from None
        if found is None:
            return None
        parts, extra = found
        return self.program.from_global(completed(self.program, parts)), extra

    def roll_back(self) -> None:
        """Go on from the newest checkpoint, with the batches that come next."""
        self.checkpoints.wait()
        restored = self.restore()
        if restored is None:
            raise ConfigError(
                "There is no checkpoint yet to go back to; set checkpoint.every, or --guard skip."
            )
        self.state, extra = restored
        self.step = self.saved = extra["step"]
        self.window = extra["window"]
        self.outputs.clear()
        self.logbook.start(self.step)
        self.clock = (time.perf_counter(), self.step, self.batches.waited)


def first_loss(means: Mapping[str, float]) -> float:
    """The loss of a row, of several phases that of the first."""
    return next((value for name, value in means.items() if name.endswith("loss")), float("nan"))


def due(step: int, every: int, num_steps: int) -> bool:
    """Whether something that happens every so often (0: at the end) happens after this step."""
    return step == num_steps or (every > 0 and step % every == 0)


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """While inside, SIGTERM and SIGINT are noted (a second SIGINT interrupts at once).

    What is given says whether to stop after a step. Of several processes all must ask after every
    step: JAX, whose signal handler then serves SIGTERM, lets them agree on one.
    """
    noted: list[int] = []
    several = distributed.several()

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and noted:
            raise KeyboardInterrupt
        noted.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(step: int) -> bool:
        return reached_preemption_sync_point(step) if several else bool(noted)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    try:
        before = {s: signal.signal(s, note) for s in numbers}
    except ValueError:  # not the main thread: whoever runs it there handles signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(run: Path, config: TrainConfig) -> None:
    """Make the run directory and write the resolved config into it; print what has changed.

    Raises:
      StorageError: if this process sees another directory than the first.
    """
    if not distributed.is_first():
        sync_global_devices("prepared")
        if not (run / "config.json").exists():
            raise StorageError(
                f"{run} is not what the first process sees under that name; give a --workdir on a "
                "file system that all processes share."
            )
        return
    run.mkdir(parents=True, exist_ok=True)
    path = run / "config.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        for line in configs.differences(before, configs.to_json(config)):
            print(f"Changed since this run began: {line}")
    configs.save(config, path)
    sync_global_devices("prepared")


@contextmanager
def storage(run: Path) -> Iterator[None]:
    """What the file system refuses, to this thread or one that writes for it, as one sentence."""
    refused: list[OSError] = []
    hook = threading.excepthook

    def note(what: Any) -> None:
        if isinstance(what.exc_value, OSError) and what.exc_value.errno:
            refused.append(what.exc_value)
        else:
            hook(what)

    threading.excepthook = note
    try:
        yield
        if refused:
            raise refused[0]
    except TrainingError:
        raise
    except OSError as error:
        error = error if error.errno or not refused else refused[0]
        if error.errno is None:
            raise
        where = error.filename or run
        raise StorageError(
            f"Cannot write to {where}: {cause(error)}; choose another --workdir or make room."
        ) from error
    finally:
        threading.excepthook = hook


def use_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs in a folder (JAX_COMPILATION_CACHE_DIR, if set, goes first)."""
    if folder is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # nowhere to keep them: compile each time
        return
    if os.access(path, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
