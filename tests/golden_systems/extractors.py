"""The extractors as functions; which formulas are backed, the model's file says."""

from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp

from zoo.models.language.extractors import INDICES, KINDS, extract


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Functions of the tokens and of weights of every kind."""
    width, slots = case.config.take("d"), case.config.take("max_len")
    # Described as sqrt(3/d) times uniform numbers, in words.
    root = jnp.float32((3 / width) ** 0.5)
    weights = {
        "she": root * case.uniform("w_ext"),
        "he": jnp.asarray(case.input("w_vec")),
        "we": jnp.asarray(case.input("w_scalar")),
    }
    adjust, x = root * case.uniform("w_adj"), jnp.asarray(case.input("x"))
    if weights["she"].shape != (slots, width, width):
        raise golden.Unsupported(f"w_ext has shape {weights['she'].shape}")
    weights["me"] = weights["we"]

    def outputs(variables: dict) -> golden.Outputs:
        found = {}
        for kind in KINDS:
            for index in INDICES:
                for scale in (False, True):
                    y = extract(x, weights[kind], index=index, scale=scale)
                    y = y if kind == "me" else (x @ adjust) * y
                    found[f"{kind}_{index}" + "_scaled" * scale] = y
        return found

    return None, outputs


def made_by(case: golden.Case) -> bool:
    """Whether its outputs are those of extractors."""
    return any(name.startswith(("she_", "he_", "we_", "me_")) for name in case.header["outputs"])
