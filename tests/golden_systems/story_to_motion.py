"""Motion matching and progressive masks of Story-to-Motion, as its description defines them."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.motion.story_to_motion import progressive_masks
from zoo.motion.matching import candidates, distances, match, standardise

MASK = re.compile(r"mask_T(\d+)_(\d+)_(\d+)_R(\d+)")


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case has."""
    if "features" in case.names:
        return None, _matching(case)
    masks = _masks(case)
    return None, lambda variables: masks


def _masks(case: golden.Case) -> golden.Outputs:
    out = {}
    for name in case.header["outputs"]:
        found = MASK.fullmatch(name)
        if found is None:
            raise golden.Unsupported(f"its output {name!r} does not say length, gap and passes")
        out[name] = progressive_masks(*map(int, found.groups()))
    case.config.ignore("cases", "masks")
    return out


def _made(case: golden.Case, name: str) -> np.ndarray:
    """An input in float64: stored, or made of uniform numbers as the file describes."""
    if name in case.inputs:
        return case.inputs[name].astype(np.float64)
    words = case.config.entries["inputs"][name].get("how", "fill.uniform").replace(" ", "")
    made = case.uniform(name).astype(np.float64)
    number = r"(\d+(?:\.\d+)?)"
    factor = f"(?:{number}\\*)?"
    found = re.fullmatch(
        rf"{factor}(\|?)fill\.uniform(?:\([^)]*\))?(\|?)(?:\*linspace\({number},{number},\w+\))?"
        rf"(?:\+{number})?",
        words,
    )
    if found is None:
        raise golden.Unsupported(f"its input {name!r} is made by {words!r}")
    times, bar, _, low, high, plus = found.groups()
    made = np.abs(made) if bar else made
    made = made * float(times or 1)
    if low:
        made = made * np.linspace(float(low), float(high), made.shape[-1])
    return made + float(plus or 0)


def _matching(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config = case.config
    options = {
        "keep": config.take("K"),
        "duration": config.take("duration"),
        "guard": config.take("guard", 0),
    }
    lengths, first = config.take("clip_lengths"), config.take("start", -1)
    config.ignore("clips", "smallest_gap")
    clip = np.repeat(np.arange(len(lengths)), lengths)
    if "clip_of_frame" in case.names and not np.array_equal(case.input("clip_of_frame"), clip):
        raise golden.Unsupported("its clip_of_frame is not that of clip_lengths")
    left = np.concatenate([np.arange(n, 0, -1) for n in lengths])
    features, weights, queries = (_made(case, n) for n in ("features", "weights", "queries"))
    texts, captions = _made(case, "query_text"), _made(case, "clip_text")

    def run(variables: dict) -> golden.Outputs:
        with jax.enable_x64(True):
            z, mean, deviation = standardise(jnp.asarray(features))
            wanted = (jnp.asarray(queries) - mean) / deviation
            current, found = jnp.asarray(first), []
            for query, text in zip(wanted, jnp.asarray(texts), strict=True):
                sem = distances(text, jnp.asarray(captions))
                allowed = candidates(sem, jnp.asarray(clip), jnp.asarray(left), current, **options)
                found.append(match(z, query, jnp.asarray(weights), allowed))
                current = found[-1].frame + options["duration"] - 1
            frames, costs, allowed = (np.stack(each) for each in zip(*found, strict=True))
            return {"picked_frame": frames, "kinematic_cost": costs, "allowed": allowed}

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the header names one of the two definitions."""
    return "motion-matching" in case.source or "progressive mask" in case.source
