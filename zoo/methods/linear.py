"""What methods on dense maps share: which maps, another kernel, and what their inputs are like."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from zoo.layers.dense import dot_general
from zoo.methods.method import Variables, intercepted
from zoo.tasks.apply import model_inputs, zeros_like_inputs

ALL_BUT_HEAD = r"(?!(.*/)?head$).*"
"""Paths of all dense maps but the last, which is left in float as is usual."""


def is_target(context: nn.module.InterceptorContext, targets: str) -> bool:
    """Whether a call is that of a dense map whose path is one of `targets`."""
    dense = context.module
    called = isinstance(dense, nn.Dense) and context.method_name == "__call__"
    return called and re.fullmatch(targets, "/".join(dense.path)) is not None


def kernel_of(dense: nn.Dense) -> Float[Array, "inputs outputs"] | None:
    """The map's kernel, or None at initialisation."""
    return (
        dense.get_variable("params", "kernel") if dense.has_variable("params", "kernel") else None
    )


def linear(
    dense: nn.Dense, x: Float[Array, "... inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "... outputs"]:
    """What the map gives with another kernel, in its own type."""
    bias = dense.get_variable("params", "bias") if dense.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=dense.dtype)
    y = dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return y if bias is None else y + bias


def refuse_added(module: nn.Module, method: Any) -> None:
    """Refuse a module with a method that adds to what its maps give.

    Raises:
      ValueError: if it has one, which a method that computes the maps itself would leave out.
    """
    if any(getattr(other, "beside", False) for other in getattr(module, "methods", ())):
        name = type(method).__name__
        raise ValueError(
            f"{name} computes the maps itself and would leave out LoRA's product; put LoRA behind "
            f"it: methods=({name}(...), LoRA(...))."
        )


@dataclass(frozen=True)
class _Watch:
    """Sows `measure(x)` of the input x of each target."""

    targets: str
    measure: Callable[[Array], Array]

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if is_target(context, self.targets):
            context.module.sow("intermediates", "watched", self.measure(args[0]))
        return call(*args, **kwargs)

    def layouts(self, layouts: Mapping[str, Any]) -> Mapping[str, Any]:
        return layouts


def observed(
    module: nn.Module,
    variables: Variables,
    batches: Sequence[Mapping[str, Array]],
    targets: str,
    measure: Callable[[Array], Array],
    merge: Callable[[Array, Array], Array],
) -> dict[tuple[str, ...], Array]:
    """Of each dense map, by its path, `measure` of its inputs, merged over calls and batches.

    Args:
      module: with the methods that it has so far.
      variables: of `module`.
      batches: of training data.
      targets: maps (path, regex of the whole).
      measure: from an input `[..., in]`; stacked layers give one each.
      merge: of two measures.

    Raises:
      ValueError: if no input could be seen: what runs in a scan tells nothing.
    """
    watched = intercepted(module, _Watch(targets, measure))

    @jax.jit
    def run(inputs: Mapping[str, Array]) -> dict[tuple[str, ...], Array]:
        _, made = watched.apply(variables, **inputs, mutable=["intermediates"])
        flat = flatten_dict(dict(made.get("intermediates", {})))
        return {
            path[:-1]: reduce(merge, values)
            for path, values in flat.items()
            if path[-1] == "watched"
        }

    found: dict[tuple[str, ...], Array] = {}
    for batch in batches:
        for path, value in run(model_inputs(module, batch)).items():
            found[path] = merge(found[path], value) if path in found else value
    if not found:
        raise ValueError(
            f"No input of a map {targets!r} of {type(module).__name__} could be seen; in a scan "
            "none can: use scan_layers=False."
        )
    return found


def dense_maps(module: nn.Module, variables: Variables, targets: str) -> list[tuple[str, ...]]:
    """Paths (in the variables) of the kernels of all dense maps that match, from shapes alone."""
    found: dict[tuple[str, ...], None] = {}

    class Listen:
        def intercept(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            if is_target(context, targets):
                found[("params", *context.module.path, "kernel")] = None
            return call(*args, **kwargs)

    listening = intercepted(module, Listen())  # a new one each time, so nothing is remembered
    jax.eval_shape(lambda v: listening.apply(v, **zeros_like_inputs(module)), dict(variables))
    return list(found)


def over_layers(function: Callable, axes: int, *args: Array) -> Any:
    """`function` of the arrays of one layer, over the leading axes of stacked layers."""
    for _ in range(args[0].ndim - axes):
        function = jax.vmap(function)
    return function(*args)


def largest_input(x: Float[Array, "... inputs"]) -> Float[Array, "inputs"]:
    """`measure` for `observed`: the largest absolute value of each channel."""
    return abs(x).max(tuple(range(x.ndim - 1)))
