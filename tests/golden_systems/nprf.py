"""Kernelised attention with relative positions, from the paper's equations."""

from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp

from zoo.models.language.nprf import exact_attention, nprf_attention


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Functions of queries, keys, values, b and the random rows."""
    layout = case.config.take("layout", "(B,H,L,D)")
    case.config.expect(layout=("(B,H,L,D)", "(B,L,H,D)"))
    swap = layout == "(B,H,L,D)"
    turn = lambda x: jnp.swapaxes(jnp.asarray(x), 1, 2) if swap else jnp.asarray(x)  # noqa: E731
    q, k, v = (turn(case.input(name)) for name in "qkv")
    b, w = jnp.asarray(case.input("b")), jnp.asarray(case.input("w"))

    def outputs(variables: dict) -> golden.Outputs:
        found = {}
        for end, causal in (("full", False), ("causal", True)):
            for name, normalised in (("nprf", True), ("prf_unnormalised", False)):
                found[f"{name}_{end}"] = nprf_attention(
                    q, k, v, b, w, causal=causal, normalised=normalised
                )
        found["exact_normalised_softmax_rpe"] = exact_attention(q, k, v, b)
        found["exact_normalised_softmax_rpe_causal"] = exact_attention(q, k, v, b, causal=True)
        return {name: turn(y) for name, y in found.items()}

    return None, outputs


def made_by(case: golden.Case) -> bool:
    """Whether its outputs are those of NPRF."""
    return "nprf_full" in case.header["outputs"] or "nprf_causal" in case.header["outputs"]
