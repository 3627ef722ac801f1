"""What is looked at before a run writes anything: data, labels, one evaluation, the step's shapes.

Each mistake is one sentence. What goes wrong while examples are read is a `DataError`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.errors
import jax
import numpy as np

from zoo.data import Data
from zoo.data.parts import labels_of
from zoo.errors import ConfigError, DataError, TrainingError
from zoo.tasks.task import Networks, Task


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what goes wrong inside, while examples are read, into one sentence."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError) or not text:
            text = f"{type(error).__name__}{f': {text}' if text else ''}"
        if isinstance(error, OSError) and error.strerror:
            text = f"Cannot read {error.filename!r}: {error.strerror.lower()}."
        raise DataError(text if len(text) > 40 else f"Reading {what} failed: {text}") from error


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turns what tracing refuses inside into one sentence."""
    try:
        yield
    except TrainingError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, flax.errors.FlaxError) as error:
        text = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")
        text = f"{text}." if isinstance(error, ValueError) else f"{type(error).__name__}: {text}."
        raise ConfigError(f"{what} do not fit together: {text[:600]}") from error


def check_platform() -> None:
    """Refuse a platform that is not here.

    Raises:
      ConfigError: naming it.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a plugin is missing
        asked = os.environ.get("JAX_PLATFORMS") or getattr(jax.config, "jax_platforms", None)
        lines = str(error).strip().splitlines()
        reason = f" ({lines[0].rstrip('.')})" if lines else ""
        if asked:
            raise ConfigError(
                f"JAX_PLATFORMS is {asked!r}, and there is no such device here{reason}; unset "
                "it, or set JAX_PLATFORMS=cpu."
            ) from None
        raise ConfigError(f"JAX finds no device here{reason}.") from None


def check_sources(data: Data) -> None:
    """Let each source look at its files.

    Raises:
      DataError: naming the first that cannot be read.
    """
    seen: list[Any] = []
    for name in ("train", "eval", "test"):
        source = getattr(data, name)
        if hasattr(source, "check") and not any(source is other for other in seen):
            with reading(f"data.{name}"):
                source.check()
            seen.append(source)


def check_all_labels(task: Task, networks: Networks, data: Data, outputs: Mapping) -> None:
    """Check the labels of every example, of sources that tell them without reading examples.

    Raises:
      DataError: naming the first that does not fit, and how many do not.
    """
    from zoo.tasks.classification import Classification, check_labels
    from zoo.tasks.distillation import Distillation

    if not isinstance(task, Classification | Distillation) or "probabilities" not in outputs:
        return
    for name in ("train", "eval", "test"):
        source = getattr(data, name)
        labels = None if source is None else labels_of(source)
        if labels is not None:
            with naming(f"data.{name}"):
                check_labels(np.asarray(labels), outputs["probabilities"].shape[-1])


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns a ValueError inside into a DataError that begins with what it is about."""
    try:
        yield
    except TrainingError:
        raise
    except ValueError as error:
        raise DataError(f"{what}: {error}") from error


def checked(task: Task, networks: Networks, outputs: Mapping, what: str) -> Callable[[Any], Any]:
    """A function that gives a batch of NumPy arrays back if it fits.

    It raises DataError, naming what does not.
    """

    def check(batch: Mapping[str, Any]) -> Mapping[str, Any]:
        with naming(what):
            task.check(networks, batch, outputs)
        for name, array in batch.items():
            if np.asarray(array).dtype.kind in "OSU":
                hint = "number them, as numpy.unique(labels, return_inverse=True) does"
                hint = hint if name == "labels" else "add a transform that makes numbers of them"
                first = np.asarray(array).reshape(-1)[0]
                raise DataError(f"{what}: {name} are not numbers but such as {first!r}; {hint}.")
        return batch

    return check
