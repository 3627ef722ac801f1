"""The checkpoints of a run while it trains: steps are written in the background and read back."""

import concurrent.futures
import contextlib
import errno
import functools
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from zoo.checkpoints import together
from zoo.checkpoints.resume import match
from zoo.checkpoints.runs.arrays import Parts, digests, load_matching
from zoo.checkpoints.runs.disk import (
    Json,
    read_manifest,
    read_scores,
    set_aside,
    steps_of,
    verify_files,
    versions,
    write_files,
    write_scores,
)
from zoo.checkpoints.runs.fit import check_shapes
from zoo.checkpoints.runs.storage import cause, quiet
from zoo.errors import CheckpointBroken, StorageError

MARGIN = 1 << 20  # bytes that a step takes besides its arrays, generously


class Checkpoints:
    """The checkpoints of one run: written behind its back, read with suspicion.

    Attributes:
      run: the run directory.
      say: called with each sentence that the user must see.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        *,
        keep: int = 3,
        keep_best: int = 0,
        metric: str = "",
        mode: str = "max",
        say: Callable[[str], None] = print,
    ) -> None:
        """Open (or begin) the checkpoints of a run.

        Args:
          run: the run directory.
          keep: how many of the latest steps stay.
          keep_best: how many of the best by `metric` stay besides.
          metric: a name in the metrics that `save` gets.
          mode: `max` or `min`.
          say: see the class.
        """
        self.run, self.say = Path(run).resolve(), say
        self.keep, self.keep_best, self.metric, self.mode = keep, keep_best, metric, mode
        self._scores = read_scores(self.run, metric, mode)
        together.off_the_devices()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._failed = False
        self._copy: Parts = {}

    @functools.cached_property
    def _orbax(self) -> Any:
        """Orbax's checkpointer, which makes the folder; nothing is written before it is asked."""
        from orbax.checkpoint import v1 as ocp

        for left in (self.run / "checkpoints").glob("*.removed"):
            shutil.rmtree(left, ignore_errors=True)
        orbax = ocp.training.Checkpointer(
            self.run / "checkpoints",
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),
            save_decision_policy=ocp.training.save_decision_policies.AnySavePolicy([]),
            cleanup_tmp_directories=True,
        )
        together.off_the_preemption_protocol(orbax)
        return orbax

    def open(self) -> None:
        """Make the folder; each process of a run calls it from the thread that trains."""
        self._orbax  # noqa: B018 (made when it is first asked for)

    # ------------------------------------------------------------------------ writing

    def save(
        self, step: int, parts: Parts, extra: Mapping[str, Any], metrics: Mapping | None = None
    ) -> None:
        """Start to write a step; waits for the one before, not for this one.

        Arrays are copied off the device before this returns, so the caller may donate them.

        Args:
          step: its number.
          parts: nested dicts of arrays by part (`params`, `optimizer`, ...).
          extra: what JSON can hold.
          metrics: of an evaluation at this step, if there was one.

        Raises:
          StorageError: if the step before could not be written.
        """
        self.wait()
        self.open()
        parts = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
        if jax.process_count() == 1:
            parts = self._copy = _host_copy(parts, self._copy)
        else:
            parts = jax.tree.map(jax.numpy.copy, parts)
        extra = {"step": step, "parts": sorted(parts), "versions": versions(), **extra}
        self._pending = (step, self._worker.submit(self._write, step, parts, extra))
        self.score(step, metrics or {})

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note what an evaluation said of a step, by which the best are kept.

        Args:
          step: its number; it need not be written yet.
          metrics: one of them is the metric by which steps are compared, or none.
        """
        value = float(metrics.get(self.metric, math.nan))
        if math.isfinite(value):
            self._scores[step] = value
            self._worker.submit(self._remove_others)

    def best(self) -> int | None:
        """The step with the best score that is known."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def _ranked(self) -> list[int]:
        """Steps with a score, the best first; of equal ones the later."""
        sign = 1 if self.mode == "max" else -1
        scores = dict(self._scores)
        return sorted(scores, key=lambda step: (sign * scores[step], step), reverse=True)

    def _write(self, step: int, parts: Parts, extra: Mapping) -> None:
        manifest = {"step": step, "leaves": digests(parts)}
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(parts)) + MARGIN
        if shutil.disk_usage(self.run).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with quiet():
            self._orbax.save_checkpointables(
                step,
                {**parts, "extra": Json(extra, False), "manifest": Json(manifest, True)},
                force=True,
            )
        if jax.process_index() == 0:
            write_files(self.run / "checkpoints" / str(step))
        self._remove_others()

    def _remove_others(self) -> None:
        """Remove steps that are neither among the latest nor among the best; the first does."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        best = [step for step in self._ranked() if step in steps][: self.keep_best]
        kept = {*steps[-self.keep :], *best}
        for step in steps:
            if step not in kept:
                folder = self.run / "checkpoints" / str(step)
                os.replace(folder, folder.with_name(f"{step}.removed"))
                shutil.rmtree(folder.with_name(f"{step}.removed"), ignore_errors=True)
        if self._scores:
            write_scores(self.run, self.metric, self.mode, self._scores)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
          StorageError: if the last step could not be written.
        """
        if self._pending is None:
            return
        (step, job), self._pending = self._pending, None
        try:
            job.result()
        except Exception as error:  # Orbax and tensorstore raise many kinds
            self._failed = True
            raise StorageError(
                f"Checkpoint {step} could not be written to {self.run}: {cause(error)}. The steps "
                "before it are kept; mend this and give the same command to go on."
            ) from error

    def close(self) -> None:
        """Finish writing and let go.

        Raises:
          StorageError: if the last step could not be written.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            if "_orbax" in vars(self):
                with quiet(), contextlib.suppress(*[Exception] * self._failed):  # it has been said
                    self._orbax.close()

    # ------------------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return steps_of(self.run / "checkpoints")

    def restore(self, abstract: Parts) -> tuple[Parts, dict[str, Any]] | None:
        """The newest step that is whole, as arrays in the shardings of `abstract`.

        Steps that are broken are moved aside, and said so.

        Args:
          abstract: nested dicts of `jax.ShapeDtypeStruct` with shardings, by part.

        Returns:
          the parts and what was saved as `extra`; None if there is no step. Leaves of the
          optimizer, running mean and carry that the step lacks are not in the parts.

        Raises:
          CheckpointMismatch: if a whole step is of another model or optimizer.
        """
        aside = None
        wanted = flatten_dict(dict(abstract), sep="/")
        while (step := together.from_first(max(self.steps(), default=-1))) >= 0:
            folder = self.run / "checkpoints" / str(step)
            try:
                with together.all_or_none(folder):
                    extra = verify_files(folder, digests=jax.process_index() == 0)
                saved = read_manifest(folder)
                found = match(saved, wanted)
                check_shapes(folder, saved, wanted, found)
                parts = load_matching(folder, saved, wanted, found)
            except CheckpointBroken as error:
                if jax.process_index() == 0:
                    aside = set_aside(folder)
                    self.say(f"{error} It was moved to {aside}.")
                together.from_first(0)  # the others go on when it is moved
                if "_orbax" in vars(self):
                    self._orbax.reload()
                continue
            if said := found.sentence():
                self.say(f"Step {step}: {said}")
            return parts, extra
        if aside is not None:  # a first save that was killed, say: nobody waits at a pod
            self.say(f"No checkpoint of {self.run} is whole: it begins anew at step 0.")
        return None


def _host_copy(parts: Parts, before: Parts) -> Parts:
    """Arrays in the host's memory, in place of those of an earlier copy where they are alike.

    Fresh memory would take longer to get than to fill.
    """
    for leaf in jax.tree.leaves(parts):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    known = dict(jax.tree_util.tree_leaves_with_path(before))

    def copy(path: Any, leaf: Any) -> np.ndarray:
        old = known.get(path)
        if old is None or old.shape != leaf.shape or old.dtype != leaf.dtype:
            return np.array(leaf, copy=True)
        np.copyto(old, np.asarray(leaf))
        return old

    return jax.tree_util.tree_map_with_path(copy, parts)
