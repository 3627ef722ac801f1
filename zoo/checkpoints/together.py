"""What the processes of a run must agree on when they read and write its checkpoints.

All of it is called from the thread that trains, in the same order on every process, except that
`off_the_devices` and `off_the_preemption_protocol` let Orbax write from another.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from zoo.errors import CheckpointBroken


def off_the_devices() -> None:
    """Let Orbax's barriers between processes go through JAX's coordination service.

    By default they are collectives on the devices. Steps are written from a thread of their own,
    where those would mix with the collectives of training, in another order on each process.
    """
    from absl import flags

    if jax.process_count() > 1:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True


def off_the_preemption_protocol(checkpointer: Any) -> None:
    """Keep an Orbax checkpointer from asking JAX whether a preemption is due at the step it writes.

    JAX takes the number that it was last asked about for the step that training is at. Asked about
    an earlier one from the writing thread, it lets the processes agree on a step that has gone by.
    """
    checkpointer._manager.reached_preemption = lambda step: False


@contextlib.contextmanager
def all_or_none(folder: Path) -> Iterator[None]:
    """What one of several processes finds broken is so for all of them.

    Raises:
      CheckpointBroken: on every process, if it was raised inside on one.
    """
    error = None
    try:
        yield
    except CheckpointBroken as broken:
        error = broken
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(np.asarray(error is not None))
        if error is None and found.any():
            error = CheckpointBroken(
                f"Checkpoint {folder} is damaged, as process {int(found.argmax())} found."
            )
    if error is not None:
        raise error


def from_first(number: int) -> int:
    """The number that the first process gives; all wait for it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def gathered(leaf: jax.Array) -> np.ndarray:
    """All of an array that lies on several processes."""
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
