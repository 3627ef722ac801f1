"""What a run has learnt, for a model: variables, and what was saved with them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.checkpoints.runs.arrays import load
from zoo.checkpoints.runs.disk import read_manifest, step_folders, verify_files
from zoo.checkpoints.runs.fit import check_model
from zoo.errors import CheckpointBroken


def load_variables(
    source: str | os.PathLike,
    model: Any = None,
    *,
    sharding: Any = None,
    averaged: bool = True,
    step: int | None = None,
) -> dict[str, Any]:
    """The variables that a run learnt, for `model.apply`.

    Args:
      source: a run directory, its `checkpoints` folder, or one step of it.
      model: check that they fit this module.
      sharding: None, a `jax.sharding.Sharding`, or `f(path, shape) -> Sharding`.
      averaged: take the running mean of the parameters, if the run kept one.
      step: which step of the run; None is the newest that is whole.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointBroken: if the step asked for, or every step, is not what was saved.
      CheckpointMismatch: if they do not fit the model.
    """
    variables, _ = load_run(source, model, sharding=sharding, averaged=averaged, step=step)
    return variables


def load_run(
    source: str | os.PathLike,
    model: Any = None,
    *,
    sharding: Any = None,
    averaged: bool = True,
    step: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as `load_variables`, with what was saved as `extra` (step, config, versions)."""
    folders = step_folders(Path(source).resolve(), step)
    for i, folder in enumerate(folders):
        try:
            extra = verify_files(folder)
            parts = _variables(folder, extra, model, sharding, averaged)
        except CheckpointBroken as error:
            if i + 1 == len(folders):
                raise
            print(f"{error} Step {folders[i + 1].name} is used instead.")
            continue
        return parts, extra
    raise FileNotFoundError(f"There is no checkpoint of a run in {str(source)!r}.")


def saved_extra(source: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """What was saved as `extra` (step, config, versions) with the newest step that is whole.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointBroken: if the step asked for, or every step, is not what was saved.
    """
    folders = step_folders(Path(source).resolve(), step)
    for i, folder in enumerate(folders):
        try:
            return verify_files(folder)
        except CheckpointBroken:
            if i + 1 == len(folders):
                raise
    raise FileNotFoundError(f"There is no checkpoint of a run in {str(source)!r}.")


def run_folder(source: str | os.PathLike) -> Path:
    """The run directory of a path that `load_run` takes."""
    folder = step_folders(Path(source).resolve(), None)[0]
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent


def is_run(source: str | os.PathLike) -> bool:
    """Whether a path is a run directory, its `checkpoints`, or one step of it."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return False
    try:
        step_folders(path.resolve(), None)
    except FileNotFoundError:
        return False
    return True


def _variables(folder: Path, extra: Mapping, model: Any, sharding: Any, averaged: bool) -> dict:
    leaves = read_manifest(folder)
    params = "ema" if averaged and "ema" in extra["parts"] else "params"
    wanted = {}
    for path, leaf in leaves.items():
        part, _, rest = path.partition("/")
        if part in (params, "frozen", "collections"):
            name = rest if part == "collections" else f"params/{rest}"
            place = sharding(name, tuple(leaf["shape"])) if callable(sharding) else sharding
            place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shape = tuple(leaf["shape"])
            wanted[path] = jax.ShapeDtypeStruct(shape, np.dtype(leaf["dtype"]), sharding=place)
    abstract = unflatten_dict(wanted, sep="/")
    if model is not None:
        check_model(folder, model, abstract, params)
    parts = load(folder, abstract)
    flat = flatten_dict(parts[params]) | flatten_dict(parts.get("frozen", {}))
    return {"params": unflatten_dict(flat), **parts.get("collections", {})}
