"""Whether a step is of the model and the optimizer that are wanted, before anything is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from zoo.checkpoints.mismatch import CheckpointMismatch, Misfit
from zoo.checkpoints.resume import Match
from zoo.checkpoints.runs.arrays import Parts


def check_shapes(folder: Path, saved: Mapping, wanted: Mapping, found: Match) -> None:
    """Compare what a step holds with what is wanted, before anything is read."""
    spare = {*found.unused, *found.afresh}
    _compare(
        f"Checkpoint {folder} is of another model than this config's.",
        {
            path: (tuple(leaf["shape"]), leaf["dtype"])
            for path, leaf in saved.items()
            if path not in spare
        },
        {
            found.source[path]: (tuple(leaf.shape), str(leaf.dtype))
            for path, leaf in wanted.items()
            if path not in spare
        },
        "Use the config it was made with, or another workdir.",
    )


def check_model(folder: Path, model: Any, abstract: Parts, params: str) -> None:
    """Compare what a step holds with what a module takes.

    Raises:
      CheckpointMismatch: naming all that is missing, unexpected or of another shape.
    """
    from zoo.checkpoints.leaves import model_leaves

    stored = model_leaves(model).stored
    flat = flatten_dict(abstract, sep="/")
    saved = {
        path.removeprefix(f"{params}/").removeprefix("frozen/").removeprefix("collections/"): leaf
        for path, leaf in flat.items()
    }
    _compare(
        f"Checkpoint {folder} does not fit {type(model).__name__}.",
        {path: (tuple(s.shape), "") for path, s in saved.items()},
        {path: (tuple(s.shape), "") for path, s in stored.items()},
        "Create the model with the overrides of the run (its config.json has them).",
    )


def _compare(headline: str, saved: Mapping, wanted: Mapping, hint: str) -> None:
    missing = [path for path in wanted if path not in saved]
    unexpected = [path for path in saved if path not in wanted]
    misshapen = [
        Misfit(path, " ".join(map(str, saved[path])), " ".join(map(str, wanted[path])))
        for path in wanted
        if path in saved and saved[path] != wanted[path]
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(headline, missing, unexpected, misshapen, hint)
