"""The checkpoints of a run while it trains: steps are written in the background and read back."""

import concurrent.futures
import contextlib
import errno
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
    set_aside,
    steps_of,
    verify_files,
    versions,
    write_files,
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
        from orbax.checkpoint import v1 as ocp

        self.run, self.say = Path(run).resolve(), say
        together.off_the_devices()
        policies: list = [ocp.training.preservation_policies.LatestN(keep)]
        if keep_best:
            policies.append(
                ocp.training.preservation_policies.BestN(
                    get_metric_fn=lambda metrics: metrics[metric],
                    reverse=mode == "min",
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.metric = metric
        self._orbax = ocp.training.Checkpointer(
            self.run / "checkpoints",
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(policies),
            save_decision_policy=ocp.training.save_decision_policies.AnySavePolicy([]),
            cleanup_tmp_directories=True,
        )
        together.off_the_preemption_protocol(self._orbax)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._failed = False
        self._copy: Parts = {}

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
        parts = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
        if jax.process_count() == 1:
            parts = self._copy = _host_copy(parts, self._copy)
        else:
            parts = jax.tree.map(jax.numpy.copy, parts)
        extra = {"step": step, "parts": sorted(parts), "versions": versions(), **extra}
        metrics = metrics or {}
        score = {self.metric: float(metrics[self.metric])} if self.metric in metrics else {}
        job = self._worker.submit(self._write, step, parts, extra, score)
        self._pending = (step, job)

    def _write(self, step: int, parts: Parts, extra: Mapping, score: Mapping) -> None:
        manifest = {"step": step, "leaves": digests(parts)}
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(parts)) + MARGIN
        if shutil.disk_usage(self.run).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with quiet():
            self._orbax.save_checkpointables(
                step,
                {**parts, "extra": Json(extra, False), "manifest": Json(manifest, True)},
                force=True,
                metrics=dict(score) or None,
            )
        if jax.process_index() == 0:
            write_files(self.run / "checkpoints" / str(step))

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
                    self.say(f"{error} It was moved to {aside}; the step before it is used.")
                together.from_first(0)  # the others go on when it is moved
                self._orbax.reload()
                continue
            if said := found.sentence():
                self.say(f"Step {step}: {said}")
            return parts, extra
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
