"""LLM-FP4's formats and quantised linear maps."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp
import numpy as np

from zoo.methods.float_quantize import Format, channel_biases, fold, row_biases


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case has."""
    case.own_weights = True
    if "in_features" not in case.config.entries:
        return None, _formats(case)
    return None, _fpq(case) if "a_tensor_bias" in case.header["outputs"] else _minmax(case)


def _formats(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    bits, wanted = case.config.take("bits"), case.header["outputs"]
    shape = next(d["shape"] for name, d in wanted.items() if name.startswith("q_"))
    amplitude = re.match(r"\s*([\d.]+)\s*\*", str(case.config.entries["inputs"].get("x", "")))
    x = (
        case.inputs["x"]
        if "x" in case.inputs
        else case.uniform("x", tuple(shape)) * np.float32(amplitude[1] if amplitude else 1)
    )
    case.unread("x")

    def run(_: dict) -> golden.Outputs:
        out = {}
        for exponent in range(1, bits):
            form = Format.of(bits, exponent)
            name = f"E{exponent}M{form.mantissa}"
            bias = form.bias(jnp.abs(x).max())
            q = form.quantise(x, bias)
            out |= {f"q_{name}": q, f"bias_{name}": bias.reshape(1)}
            out[f"mse_{name}"] = jnp.mean((q - x) ** 2).reshape(1)
        for name in wanted:
            grid = re.fullmatch(r"grid_E(\d+)M(\d+)_bias(.+)", name)
            if grid:
                form = Format(int(grid[1]), int(grid[2]))
                out[name] = form.grid(float(grid[3].replace("_", ".")))
        return out

    return run


def _settings(case: golden.Case) -> tuple[int, int, int, int]:
    """Bits and exponent bits of weights and activations."""
    config = case.config
    # rows have a bias each, whatever n_V is
    config.ignore("in_features", "out_features", "bias", "B", "n_V", "mode", "metric")
    config.expect(n_a=(1, None), bias_bit=(None,))
    config.ignore("bias_correction")  # only the class of the largest numbers reads it
    bits, exponent = config.take("bits", 8), config.take("exponent_bits", 4)
    return (
        config.take("w_bit", bits),
        config.take("w_exponent_bit", exponent),
        config.take("a_bit", bits),
        config.take("a_exponent_bit", exponent),
    )


def _x(case: golden.Case) -> np.ndarray:
    if "x" in case.inputs:
        return case.inputs["x"]
    shape = (case.config.take("B"), case.config.take("in_features"))
    words = str(case.config.entries["inputs"].get("x", ""))
    amplitude = re.match(r"\s*([\d.]+)\s*\*", words)
    x = case.uniform("x", shape) * np.float32(amplitude[1] if amplitude else 1)
    powers = re.search(r"2\^\(c%(\d+)-(\d+)\)", words)
    if powers:
        channel = np.arange(shape[1]) % int(powers[1]) - int(powers[2])
        x = x * np.float32(2.0) ** channel.astype(np.float32)
    return x


def _minmax(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    wb, we, ab, ae = _settings(case)
    case.config.expect(n_H=(1, None))
    x, state = _x(case), case.state_dict()
    weight, added = state["weight"], state.get("bias", 0)
    corrects = case.config.take("bias_correction", False) and "bias" in state

    def run(_: dict) -> golden.Outputs:
        out = {}
        for suffix, whole in (("", False), ("_intpow", True)):
            of_w = Format.of(wb, we, whole_powers=whole)
            of_x = Format.of(ab, ae, whole_powers=whole)
            w_bias, a_bias = of_w.bias(jnp.abs(weight).max()), of_x.bias(jnp.abs(x).max())
            w_q, x_q = of_w.quantise(weight, w_bias), of_x.quantise(x, a_bias)
            moved = (x_q @ (w_q - weight).T).mean(0) if corrects else 0  # of the outputs
            out |= {f"w_q{suffix}": w_q, f"x_q{suffix}": x_q}
            out[f"y{suffix}"] = x_q @ w_q.T + added - moved
            out |= {f"w_bias{suffix}": w_bias.reshape(1), f"a_bias{suffix}": a_bias.reshape(1)}
        return out

    return run


def _fpq(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    wb, we, ab, ae = _settings(case)
    x, state = _x(case), case.state_dict()
    weight, added = state["weight"], state.get("bias", 0)

    blocks = case.config.take("n_H") or 1

    def run(_: dict) -> golden.Outputs:
        of_w, of_x = Format.of(wb, we), Format.of(ab, ae)
        parts = jnp.reshape(weight, (len(weight) * blocks, -1))  # of a row, with a bias each
        w_bias = row_biases(of_w, parts)
        wanted, rho, shift = channel_biases(of_x, jnp.abs(x).max(0))
        x_q = of_x.quantise(x, rho + shift)
        w_q = of_w.quantise(parts, w_bias).reshape(weight.shape)
        return {
            "a_bias": wanted[:, None],
            "a_bias_rounded": rho + shift,
            "a_tensor_bias": rho.reshape(1),
            "shift": shift,
            "x_q": x_q,
            "w_q": w_q,
            "w_bias": w_bias.reshape(case.header["outputs"].get("w_bias", {}).get("shape", -1)),
            "y": x_q @ w_q.T + added,
            "w_folded": fold(w_q, shift),
        }

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository, or its formulas."""
    return "LLM-FP4" in case.source or "FPMinMaxQuantLinear" in case.source
