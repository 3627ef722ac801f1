"""SlimFit's operations and its schedule."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import fill
import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.methods import slimfit


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """All operations of a case; shapes are those that its `shape` gives."""
    config, wanted = case.config, case.header["outputs"]
    case.own_weights = True
    batch, length, channels = config.take("shape")
    heads = wanted["smm_y"]["shape"][1] if "smm_y" in wanted else 2
    epsilon = config.take("eps", 1e-12)
    layers = wanted["dist"]["shape"][0] if "dist" in wanted else 6
    config.ignore("rate", "heads")
    square = (batch, heads, length, length)
    shapes = {
        "x": (batch, length, channels),
        "g": (batch, length, channels),
        "a": square,
        "v": (batch, heads, length, channels),
        "ga": (batch, heads, length, channels),
        "m1": (batch, length, channels),
        "m2": (batch, channels, length),
        "gm": (batch, length, length),
    }
    words = case.config.entries.get("inputs", {})

    def made(name: str) -> np.ndarray:
        factor = re.match(r"\s*([\d.]+)\s*\*", str(words.get(name, "")))
        x = case.inputs[name] if name in case.inputs else case.uniform(name, shapes[name])
        return x if name in case.inputs or not factor else x * np.float32(factor[1])

    x, g, a, v, ga, m1, m2, gm = (made(name) for name in shapes)
    state = case.state_dict()
    scale, bias = state["weight"], state["bias"]

    def run(_: dict) -> golden.Outputs:
        y, back = jax.vjp(slimfit.gelu, x)
        out = {"gelu_y": y, "gelu_gx": back(g)[0]}
        out["gelu_code"] = slimfit.codes(x, slimfit.GELU_STEP, -8, 7)
        y, back = jax.vjp(slimfit.softmax_matmul, a, v)
        out |= {"smm_y": y, **dict(zip(("smm_ga", "smm_gv"), back(ga), strict=True))}
        y, back = jax.vjp(slimfit.matmul, m1, m2)
        out |= {"mm_y": y, **dict(zip(("mm_g1", "mm_g2"), back(gm), strict=True))}
        for frozen, name in ((False, "active"), (True, "frozen")):

            def norm(x: Any, scale: Any, bias: Any, frozen: bool = frozen) -> Any:
                return slimfit.layer_norm(x, scale, bias, epsilon, frozen)

            out["ln_y"], back = jax.vjp(norm, x, scale, bias)
            of = dict(zip(("gx", "gw", "gb"), back(g), strict=True))
            out |= {f"ln_{name}_{key}": value for key, value in of.items()}
        distances = []
        for i in range(layers):
            before = fill.uniform(f"W{i}", (4, 3)) + 2
            moved = before * (1 + np.float32(0.01 * (i + 1)) * fill.uniform(f"d{i}", (4, 3)))
            distances.append(slimfit.distance(before, moved))
        order = slimfit.frozen_layers(jnp.stack(distances), 0.5)
        out |= {"dist": jnp.stack(distances), "freeze_order": order}
        for name in wanted:
            rate = re.fullmatch(r"active_at_rate_(\d+)of(\d+)", name)
            if rate:
                frozen = int(Fraction(int(rate[1]), int(rate[2])) * layers)
                out[name] = jnp.sort(order[frozen:])
        return out

    return None, run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "SlimFit" in case.source
