"""The training loop: from a config to a run directory that can be continued."""

import collections
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from zoo.checkpoints import together
from zoo.checkpoints.runs import Checkpoints
from zoo.data.parts import facts
from zoo.errors import ConfigError, DataError, NonFiniteError, StorageError, TrainingError
from zoo.training import config as configs
from zoo.training import distributed
from zoo.training.checks import (
    check_all_labels,
    check_platform,
    check_sources,
    fitting,
    reading,
)
from zoo.training.config import TrainConfig
from zoo.training.directory import (
    Lock,
    check_alike,
    check_writable,
    prepare,
    storage,
    use_compilation_cache,
)
from zoo.training.guard import Guard, watched
from zoo.training.logbook import Logbook
from zoo.training.optimizer import make_schedule
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


class Halt(BaseException):
    """Asked to stop in the middle of an evaluation, which leaves the state as it is."""


@dataclass(frozen=True)
class Result:
    """What a run ends with: the last evaluation, the state and the run directory."""

    metrics: dict[str, float]
    state: State
    workdir: Path


def train(
    config: TrainConfig,
    workdir: str | os.PathLike,
    *,
    profile: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Result:
    """Train, or continue the run that is in `workdir`.

    Nothing is written before model, data, devices, a first batch and an evaluation batch have been
    tried. A run directory is locked while it is used.

    Args:
      config: what to do.
      workdir: the run directory; made if it is not there.
      profile: write a trace of ten steps.
      origin: the config file and the flags it comes from, which a later command goes on from.

    Raises:
      ConfigError: if the config does not fit the model, the devices or the data.
      DataError: if an example cannot be read or does not fit.
      StorageError: if the run directory cannot be written, or is in use.
      NonFiniteError: if the guard gives up.
      Stopped: after SIGTERM or SIGINT, when all is saved.
      Lost: if another process of the run is gone.
    """
    distributed.initialize()
    check_platform()
    distributed.check_joined()
    use_compilation_cache(config.compilation_cache)
    run = Path(workdir).resolve()
    with distributed.together(), storage(run), Lock(run) as lock:
        check_alike(config)
        check_writable(run)
        check_sources(config.data)
        program = make_program(config)
        logbook = Logbook(run, config.num_steps, active=jax.process_index() == 0)
        with ExitStack() as stack:
            stack.callback(logbook.close)
            stack.enter_context(program.context())
            loop = Loop(config, run, program, logbook, profile)
            stack.callback(loop.close)
            loop.try_out()
            prepare(run, config, lock, origin)
            return loop.run_to_end()


class Loop:
    """One run: its state, its data and where they are kept."""

    def __init__(
        self, config: TrainConfig, run: Path, program: Program, logbook: Logbook, profile: bool
    ) -> None:
        """Restore the newest checkpoint, or begin."""
        from zoo.data import train_iterator

        self.config, self.run, self.program, self.logbook = config, run, program, logbook
        self.profile = profile
        metric, mode = config.best
        self.checkpoints = Checkpoints(
            run,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            metric=metric,
            mode=mode,
            say=lambda text: logbook.say(f"WARNING: {text}", style="bold red"),
        )
        self.window: dict[str, list[float]] = {}
        self.evaluated: dict[str, float] = {}
        self.saved = self.evaluated_at = -1
        self.halting = self.noted = self.warned = False
        restored = self.restore()
        if restored is None:
            self.step = self.begun_with = 0
            self.state: State | None = None  # made in `try_out`, when all else is known to fit
        else:
            self.state, extra = restored
            self.step = self.saved = extra["step"]
            if self.step > config.num_steps:
                raise ConfigError(
                    f"num_steps is {config.num_steps}, and {run} has taken {self.step} steps; give "
                    "more, or measure the run with eval.py."
                )
            self.window = extra["window"]
            self.begun_with = extra.get("examples", self.step * config.data.batch_size)
            logbook.say(f"Continuing {run} after step {self.step}.")
            if said := jump(extra.get("config"), config, self.step):
                logbook.say(said)
        with reading("the training data"):
            iterator = train_iterator(
                config.data, config.seed, *program.share(), start=self.begun_with
            )

        def read() -> Any:
            with reading("a training example"):
                return next(iterator)

        self.check: Any = None
        self.predicted: Mapping[str, Any] = {}

        def place(batch: Any) -> Any:
            if self.check is None:
                self.check, self.predicted = program.check(batch, "data.train")
            return program.place(self.check(batch))

        names = watched(turns(config.task.phases), program.assigned)
        self.guard = Guard(config.guard, config.guard_limit, names)
        self.outputs: collections.deque = collections.deque()
        self.batches = Prefetch(read, place, config.prefetch)
        self.clock = (time.perf_counter(), self.step, 0.0)

    def close(self) -> None:
        """Stop reading."""
        self.batches.close()

    def try_out(self) -> None:
        """One batch to train on and one held-out batch, and the first state, before any writing.

        Raises:
          ConfigError: if model, task and data do not fit together, `checkpoint.metric` is no
            metric of theirs, or a checkpoint to begin with is not there or does not fit.
        """
        program, config = self.program, self.config
        self.first = next(self.batches)
        check_all_labels(config.task, program.networks, config.data, self.predicted)
        with fitting("The model, the task and the training data"):
            program.trace(self.first)
        if len(config.data.eval) == 0:
            raise DataError(f"{config.data.eval!r} has no examples to evaluate on.")
        batches = program.held_out(config.data)
        with contextlib.closing(batches), fitting("The model, the task and the held-out data"):
            found = program.measures(next(batches))
        metric = config.checkpoint.metric
        if metric is not None and metric not in found and not config.evaluators:
            raise ConfigError(
                f"checkpoint.metric is {metric!r}; the metrics of this task are "
                f"{', '.join(sorted(found))}."
            )
        if self.state is None:
            self.state = first_state(program, self.first)

    def run_to_end(self) -> Result:
        """The loop itself."""
        config, started = self.config, time.perf_counter()
        self.logbook.start(self.step)
        with ExitStack() as stack:
            self.checkpoints.open()
            stack.callback(self.checkpoints.close)
            profile = None
            if self.profile and distributed.is_first():
                profile = Profile(self.run / "profile", self.step, self.logbook.say)
                stack.callback(lambda: profile.stop(self.step))
            asked_to_stop = stack.enter_context(stop_signals(self))
            self.clock = (time.perf_counter(), self.step, 0.0)
            if self.missed_evaluation():
                self.evaluate()
            while self.step < config.num_steps:
                with self.saving_first():
                    batch, self.first = self.first or next(self.batches), None
                with profile.step(self.step, self.state) if profile else nullcontext():
                    self.state, output = self.program.step(self.state, batch)
                self.step += 1
                self.outputs.append((self.step, output))
                with self.saving_first():
                    self.look(LAG)
                    stop = asked_to_stop(self.step)
                    evaluates = due(self.step, config.eval_every, config.num_steps)
                    if evaluates or stop or due(
                        self.step, config.checkpoint.every, config.num_steps
                    ):  # fmt: skip
                        self.look(0)
                if due(self.step, config.checkpoint.every, config.num_steps):
                    self.save()
                if evaluates and not stop:
                    self.evaluate()
                if stop and (self.step < config.num_steps or evaluates):
                    self.stop()
            if not self.evaluated:
                self.evaluate()
            self.test()
        self.logbook.picture()
        self.logbook.close()
        self.logbook.table(time.perf_counter() - started)
        return Result(self.evaluated, self.program.to_global(self.state), self.run)

    def stop(self) -> None:
        """Save, and end as asked.

        Raises:
          Stopped: always.
        """
        self.save()
        self.checkpoints.wait()
        self.logbook.picture()
        raise Stopped(
            f"Stopped and saved at step {self.step} of {self.config.num_steps}; give the "
            f"same command with --workdir {self.run} to continue."
        )

    @contextmanager
    def saving_first(self) -> Iterator[None]:
        """Saves the state before an error inside ends the run: the state is that of good steps."""
        try:
            yield
        except Exception as error:
            alone = jax.process_count() == 1 or isinstance(error, NonFiniteError)
            if self.step < 1 or not alone or isinstance(error, StorageError | Stopped):
                raise
            self.outputs.clear()
            self.save()
            self.checkpoints.wait()
            if not isinstance(error, TrainingError):
                self.logbook.say(f"Step {self.step} is saved.")
                raise
            raise type(error)(
                f"{error} Step {self.step} is saved, and the same command goes on from there."
            ) from error

    def missed_evaluation(self) -> bool:
        """Whether the run was ended between saving this step and its evaluation."""
        missed = 0 < self.step < self.config.num_steps and due(
            self.step, self.config.eval_every, self.config.num_steps
        ) and not any(
            row["step"] == self.step and any(name.startswith("eval/") for name in row)
            for row in self.logbook.rows
        )  # fmt: skip
        return bool(together.from_first(int(missed)))

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
        """Measure the held-out examples, every one once, and run the evaluators that are due.

        Raises:
          Stopped: if that is asked for meanwhile.
        """
        with self.saving_first(), self.halts():
            self.look(0)
            started = time.perf_counter()
            self.evaluated = self.program.evaluate(self.state.variables(), each=self.halt)
            self.evaluated |= self.run_evaluators()
        self.logbook.row(self.step, {f"eval/{k}": v for k, v in self.evaluated.items()})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in self.evaluated.items())
        self.logbook.say(f"step {self.step}  held out: {shown}")
        lost = time.perf_counter() - started
        self.clock = (self.clock[0] + lost, *self.clock[1:])
        self.evaluated_at = self.step
        if self.saved == self.step:
            self.checkpoints.score(self.step, self.evaluated)
        metric = self.config.best[0]
        if metric not in self.evaluated and self.config.checkpoint.keep_best and not self.warned:
            self.warned = True
            self.logbook.say(
                f"WARNING: there is no metric {metric!r} here, by which the best checkpoint would "
                "be kept; checkpoint.metric names another.", style="bold red",
            )  # fmt: skip

    def test(self) -> None:
        """Measure the examples of `data.test`, by which nothing is chosen, with the last state."""
        data = self.config.data
        if data.test is None:
            return
        with self.saving_first(), self.halts():
            other = dataclasses.replace(data, eval=data.test, test=None)
            found = self.program.evaluate(self.state.variables(), other, each=self.halt)
        found = {f"test/{name}": value for name, value in found.items()}
        self.logbook.row(self.step, found)
        self.logbook.say("test: " + "  ".join(f"{k[5:]} {v:.4f}" for k, v in found.items()))
        self.evaluated |= found

    def halt(self) -> None:
        """Between batches of an evaluation: stop if that was asked for."""
        if self.halting and self.noted and not distributed.several():
            self.halting = False
            raise Halt

    @contextmanager
    def halts(self) -> Iterator[None]:
        """Inside, a signal to stop takes effect at once."""
        self.halting = True
        try:
            yield
        except Halt:
            self.halting = False
            self.stop()
        finally:
            self.halting = False

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
            with fitting(type(evaluator).__name__ + " and what it measures"):
                found |= evaluator.run(self.program, variables, self.config.data, self.run)
        return found

    def save(self) -> None:
        """Start to write a checkpoint of this step."""
        if self.step == self.saved:
            return
        # batches that were given and not yet used are read again
        used = self.batches.count - (self.first is not None)
        extra = {
            "examples": self.begun_with + used * self.config.data.batch_size,
            "window": self.window,
            "config": configs.to_json(self.config),
            "facts": facts(self.config.data.train),
        }
        parts = self.program.to_global(self.state).to_parts()
        self.checkpoints.save(self.step, parts, extra)
        if self.evaluated_at == self.step:
            self.checkpoints.score(self.step, self.evaluated)
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


def jump(before: Any, config: TrainConfig, step: int) -> str | None:
    """What the learning rate does where a run goes on with another schedule, if it leaps."""
    if not isinstance(before, dict):
        return None
    try:
        old = configs.from_json({"steps": before["num_steps"], "optimizer": before["optimizer"]})
    except (KeyError, TypeError, TrainingError):
        return None
    old_optimizer, new_optimizer = old["optimizer"], config.optimizer
    if isinstance(new_optimizer, dict) or not isinstance(old_optimizer, type(new_optimizer)):
        return None
    last = float(make_schedule(old_optimizer, old["steps"])(max(step - 1, 0)))
    rate = float(make_schedule(new_optimizer, config.num_steps)(step))
    if (rate <= 1.5 * last and last <= 1.5 * max(rate, 1e-12)) or step >= config.num_steps:
        return None
    return (
        f"The learning rate goes from {last:.3g} to {rate:.3g} here: the schedule "
        f"({new_optimizer.schedule}) now spans {config.num_steps} steps."
    )


@contextmanager
def stop_signals(loop: Loop) -> Iterator[Callable[[int], bool]]:
    """While inside, SIGTERM and SIGINT are noted (a second SIGINT interrupts at once).

    What is given says whether to stop after a step. Of several processes all must ask after every
    step: JAX, whose signal handler then serves SIGTERM, lets them agree on one. One process alone
    also stops in the middle of an evaluation, which changes nothing.
    """
    noted: list[int] = []
    several = distributed.several()

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and noted:
            raise KeyboardInterrupt
        noted.append(number)
        loop.noted = True
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif loop.halting:
            loop.halting = False
            raise Halt

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
