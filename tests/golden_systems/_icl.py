"""What the cases of in-context learners share: prompts, entries with several names."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np


def array(case: golden.Case, name: str) -> np.ndarray:
    """An input: stored, or made from its name; `sign` in its description: of -1 and 1."""
    described = case.config.entries.get("inputs", {}).get(name)
    if name in case.inputs or "sign" not in str(described):
        return case.input(name)
    return np.where(case.uniform(name) >= 0, 1, -1).astype(np.float32)


def first(case: golden.Case, *names: str, default: Any = None) -> Any:
    """The entry that goes by one of these names."""
    values = [case.config.take(name) for name in names]
    return next((value for value in values if value is not None), default)


def depth(case: golden.Case, *places: str) -> int:
    """How many numbers follow one of these texts in the names of the state dict."""
    numbers = {
        int(name.removeprefix(place).split(".")[0])
        for name in case.shapes
        for place in places
        if name.startswith(place)
    }
    return len(numbers)


def agreed(case: golden.Case, found: Any, *names: str) -> Any:
    """A size that the tensors show; an entry of the config by one of these names must agree."""
    asked = first(case, *names, default=found)
    if asked != found:
        raise golden.Unsupported(f"{names[0]} is {asked}, but its tensors say {found}")
    return found


def sizes(case: golden.Case) -> dict[str, int]:
    """Sizes that every learner has, from both of its ends."""
    shapes = case.shapes
    into = "_read_in.weight" if "_read_in.weight" in shapes else "_read_in.net.0.weight"
    out = "_read_out.weight" if "_read_out.weight" in shapes else "_read_out.net.0.weight"
    return {
        "dims": agreed(case, shapes[into][1], "n_dims", "dims", "d"),
        "embed_dim": agreed(case, shapes[out][1], "n_embd", "d_model", "embed_dim"),
    }


def outputs(case: golden.Case) -> int:
    """How many numbers are read out at a point; 0: there is no learner."""
    ends = (case.shapes.get(f"_read_out.{name}") for name in ("weight", "net.4.weight"))
    return next((shape[0] for shape in ends if shape is not None), 0)


def predictions(case: golden.Case, model: Any, *, axis: int | None = None) -> Callable:
    """Runs a learner on the prompts; `axis`: which one goes to the front of the predictions."""
    xs, ys = array(case, "xs"), array(case, "ys")
    chosen = first(case, "inds")
    chosen = case.input("inds") if "inds" in case.names else chosen

    def run(variables: dict) -> golden.Outputs:
        out = jax.jit(model.apply)(variables, xs, ys)
        out = out if chosen is None else out[:, np.asarray(chosen, int)]
        out = out if axis is None else np.moveaxis(np.asarray(out), axis, 0)
        return dict.fromkeys(case.header["outputs"], out) if one(case) else {"pred": out}

    return run


def one(case: golden.Case) -> bool:
    """Whether the case has a single output, whatever its name."""
    return len(case.header["outputs"]) == 1
