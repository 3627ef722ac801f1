"""Joining the other processes of a run, where there are any, and leaving them.

What carries the run is JAX's own: `jax.distributed` finds the processes, watches their heartbeats
and passes on a SIGTERM that one of them gets. Here is when it starts, and what its errors mean.

A process that dies is noticed by the others at once where the connection to it breaks in a
collective, and after `HEARTBEAT_SECONDS` otherwise. They then end: by `Lost`, or by JAX, which
aborts a process that is not in Python at that moment (SIGABRT).
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from zoo.errors import ConfigError, TrainingError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECONDS = 30
EXIT_LOST = 76
"""Exit code when another process of the run is gone: give the same command again everywhere. It is
EX_PROTOCOL of sysexits.h."""

_GONE = re.compile(
    r"gloo|nccl|coordination service|heartbeat|barrier|preempted|unhealthy|UNAVAILABLE"
    r"|connection (reset|refused|closed)|socket closed",
    re.IGNORECASE,
)


class Lost(TrainingError):
    """Another process of the run is gone."""


def in_cluster() -> bool:
    """Whether this process was started as one of several, by what JAX can tell from.

    SLURM and Open MPI with more than one task, several TPU workers or slices, or the three
    variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Raises:
      ConfigError: if some of the three are set that mean nothing without the others.
    """
    given = [name for name in EXPLICIT if name in os.environ]
    if len(given) == len(EXPLICIT):
        return True
    if given and given != [EXPLICIT[0]]:  # the address alone overrides what JAX finds
        missing = next(name for name in EXPLICIT if name not in given)
        raise ConfigError(f"{given[-1]} is set, but {missing} is not; set {', '.join(EXPLICIT)}.")
    several = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    inside = "SLURM_STEP_ID" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ
    if inside and any(n.isdecimal() and int(n) > 1 for n in several):
        return True
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    named = len(workers) > 1 and all(re.fullmatch(r"[\w.:-]+", worker) for worker in workers)
    return named or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def initialize(detect: bool = False) -> None:
    """Start `jax.distributed` if this process is one of several; else do nothing.

    Args:
      detect: leave it to JAX to find the others, also where nothing here says that there are any
        (TPU VMs, Kubernetes jobs).

    Raises:
      ConfigError: if the variables are not what they should be, or the others are not found.
    """
    if jax.distributed.is_initialized() or not (in_cluster() or detect):
        return
    address = count = index = None
    if all(name in os.environ for name in EXPLICIT):
        address, *numbers = (os.environ[name] for name in EXPLICIT)
        for name, number in zip(EXPLICIT[1:], numbers, strict=True):
            if not number.isdecimal():
                raise ConfigError(f"{name} is {number!r}; give a number.")
        count, index = map(int, numbers)
        if not re.fullmatch(r".+:\d+", address) or not index < count:
            raise ConfigError(
                f"{EXPLICIT[0]}={address} with process {index} of {count}: give HOST:PORT of "
                f"process 0, and processes from 0 to {count - 1}."
            )
    try:
        jax.distributed.initialize(
            address, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"The processes of the run do not find each other: {reason}") from error


def several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process speaks and logs for all."""
    return not several() or jax.process_index() == 0


def check_joined() -> None:
    """Refuse to train where JAX sees other processes that were not joined.

    Raises:
      ConfigError: if there are some.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"JAX sees {jax.process_count()} processes here, but they were not joined; add "
            "--distributed."
        )


@contextmanager
def together() -> Iterator[None]:
    """Turns what goes wrong inside because another process is gone into `Lost`."""
    try:
        yield
    except Exception as error:
        reason = _gone(error)
        if reason is None:
            raise
        raise Lost(
            f"Another process of this run is gone ({reason}). Give the same command to every "
            "process again to continue from the last checkpoint."
        ) from error


def _gone(error: BaseException | None) -> str | None:
    """What in an error, or in its causes, says that another process is gone."""
    if not several():
        return None
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError | OSError) and _GONE.search(text):
            return text[:160]
        error = error.__cause__ or error.__context__
    return None


def leave(code: int) -> None:
    """End a process of several after an error, without waiting for the others.

    They notice when this one does not answer. The first process, which all are connected to, goes
    last, so that the others can say what they have to say.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if several():
        if is_first():
            time.sleep(2)
        os._exit(code)
