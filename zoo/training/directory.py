"""The directory of a run: its lock, its config, and what the file system refuses."""

import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.multihost_utils import sync_global_devices

from zoo.checkpoints.runs import cause
from zoo.errors import ConfigError, StorageError, TrainingError
from zoo.training import config as configs
from zoo.training import distributed
from zoo.training.config import TrainConfig


class Lock:
    """One run at a time in a run directory, of all processes of this machine and its file system.

    Used as a context; `take` makes the directory first where it is not there.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file: Any = None

    def __enter__(self) -> "Lock":
        if self.run.is_dir() and any(self.run.iterdir()):
            self.take()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def take(self) -> None:
        """Take the lock, if this is the first process and it does not have it yet.

        Raises:
          StorageError: if another run has it.
        """
        if self._file is not None or not distributed.is_first():
            return
        self.run.mkdir(parents=True, exist_ok=True)
        self._file = open(self.run / "lock", "a+")
        try:
            import fcntl
        except ImportError:  # a system without locks of this kind
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            who = self._file.read().strip() or "another process"
            raise StorageError(
                f"{self.run} is in use by {who}; wait for it, or choose another --workdir."
            ) from None
        except OSError:  # a file system without locks
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
        self._file.flush()


def check_writable(run: Path) -> None:
    """Refuse a run directory that cannot be made, before anything is computed.

    Raises:
      StorageError: if it is a file, or its folder cannot be written.
    """
    place = run
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StorageError(f"{place} is a file; choose another --workdir.")
    if distributed.is_first() and not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(
            f"Cannot write to {run}: permission denied; choose another --workdir or make room."
        )


def check_alike(config: TrainConfig) -> None:
    """Refuse processes of one run that were given different commands.

    Where data lies may differ from one machine to another.

    Raises:
      ConfigError: on every process but the first, naming what differs from it, and on the first.
    """
    if jax.process_count() == 1:
        return
    ours = configs.to_json(config)
    text = np.frombuffer(json.dumps(ours).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = text[:size]
    first = json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
    lines = [
        line
        for line in configs.differences(first, ours)
        if not line.partition(":")[0].endswith(("path", "data_dir", "source"))
    ]
    wrong = multihost_utils.process_allgather(np.asarray(bool(lines)))
    if wrong.any():
        what = f" ({'; '.join(lines[:3])})" if lines else ""
        raise ConfigError(
            f"The processes of this run were not given the same command: process "
            f"{int(wrong.argmax())} differs from the first{what}; give all of them the same."
        )


def prepare(
    run: Path, config: TrainConfig, lock: Lock, origin: Mapping[str, Any] | None = None
) -> None:
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
    lock.take()
    path = run / "config.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        for line in configs.differences(before, configs.to_json(config)):
            print(f"Changed since this run began: {line}")
    configs.save(config, path)
    if origin is not None:
        draft = run / "origin.json.tmp"
        draft.write_text(json.dumps(origin, indent=2) + "\n")
        os.replace(draft, run / "origin.json")
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
        # first values are dozens of programs that compile quickly
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
