"""Arithmetic of a traced program, counted from its jaxpr.

XLA's own cost analysis counts the body of a loop once, whatever the number of iterations, and does
not look into kernels. Here the body of a `scan` counts as often as it runs, a Pallas kernel as
often as its grid has cells (also where it skips one), and of code that depends on the platform the
branch of the one asked for; so it does of the kernels' calls, which hold no program before that.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import numpy as np

from kernels_pallas import lazy


def count_flops(jaxpr: Any, platform: str = "tpu") -> float:
    """Floating-point operations of the matrix products and convolutions, two a multiply-add.

    Pointwise arithmetic is left out, as is usual where utilisation is told; a `while` loop whose
    number of iterations the program decides counts once. Work inside `shard_map` counts for all
    shards.

    Args:
      jaxpr: a `ClosedJaxpr`, as `jax.jit(f).trace(...).jaxpr` or `jax.make_jaxpr` give it.
      platform: for which to count.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    platforms: dict[Any, tuple] = {}  # variable -> of the platform index that it holds
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            platforms[equation.outvars[0]] = params["platforms"]
        elif name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == lazy.call_p.name:
            total += count_flops(lazy.program(equation, platform), platform)
        elif name == "cond":
            branches = params["branches"]
            known = platforms.get(_source(jaxpr, equation.invars[0]))
            if known is not None:
                branches = [branches[_index(known, platform, len(branches))]]
            total += max(count_flops(branch, platform) for branch in branches)
        else:
            inner = sum(count_flops(part, platform) for part in inner_programs(params))
            total += inner * _times(name, params)
    return total


def _times(name: str, params: dict) -> int:
    """How often the inner programs of an equation run."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        mesh, manual = params["mesh"], params.get("manual_axes") or params["mesh"].axis_names
        return math.prod(mesh.shape[axis] for axis in manual)
    if name == "pallas_call":
        return math.prod(int(n) for n in params["grid_mapping"].grid)
    return 1


def inner_programs(params: dict) -> Iterator[Any]:
    """The programs inside an equation (of a custom rule, the one that computes the value)."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                yield part


def _source(jaxpr: Any, variable: Any) -> Any:
    """The variable that a chain of conversions and clampings starts at."""
    made_by = {out: equation for equation in jaxpr.eqns for out in equation.outvars}
    while (equation := made_by.get(variable)) is not None and equation.primitive.name in (
        "convert_element_type",
        "clamp",
    ):
        operands = [v for v in equation.invars if not hasattr(v, "val")]
        if len(operands) != 1:
            break
        variable = operands[0]
    return variable


def _index(platforms: tuple, platform: str, branches: int) -> int:
    """The branch of a platform: the one whose group names it, else the default (None)."""
    for i, group in enumerate(platforms):
        if group is not None and platform in group:
            return i
    return next((i for i, group in enumerate(platforms) if group is None), branches - 1)


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _convolution(equation: Any) -> float:
    """Taps on zeros that dilation or padding put in are not counted."""
    params, (left, right) = equation.params, (v.aval.shape for v in equation.invars[:2])
    numbers = params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    taps = 1.0
    for i in range(len(left) - 2):
        taps *= _taps(
            left[numbers.lhs_spec[2 + i]],
            right[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            params["window_strides"][i],
            params["padding"][i][0],
            params["lhs_dilation"][i],
            params["rhs_dilation"][i],
        )
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    channels = right[numbers.rhs_spec[1]]
    return 2.0 * batch * features * channels * taps / params["batch_group_count"]


def _taps(size: int, kernel: int, out: int, stride: int, pad: int, left: int, right: int) -> int:
    """How many pairs of output and tap meet an element along one axis."""
    at = np.arange(out)[:, None] * stride - pad + np.arange(kernel) * right
    return int(((at >= 0) & (at <= (size - 1) * left) & (at % left == 0)).sum())
