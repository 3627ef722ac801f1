"""Where activations live on a device mesh: models name the axes, the mesh decides.

    x = constrain(x, "batch", "length", "channels")

The mesh axes are those of `kernels_pallas.axes`. In `jax.set_mesh(mesh)`
a constraint becomes `lax.with_sharding_constraint`; without a mesh, on one device and inside
`jax.pmap` or `shard_map` it says nothing of places. An activation that has a place is also computed
once (`zoo.layers.materialize`): without that, programs for CPUs grow with the square of the depth.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

from kernels_pallas.axes import BATCH_AXES, HEAD_AXES, LENGTH_AXES
from zoo.layers.materialize import materialized

ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "length": LENGTH_AXES,
    "heads": HEAD_AXES,
    "mlp": HEAD_AXES,
    "vocab": HEAD_AXES,
}
"""Logical axis -> mesh axes. An axis that is not listed (channels, head_dim, height) is whole."""


def activation_spec(shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec | None:
    """The spec of an activation on the mesh in context; None if there is nothing to say.

    Mesh axes of size one, axes under manual control and axes that do not divide the dimension are
    left out: an activation, unlike a parameter, may always be whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    sizes = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size > 1
    }
    if not sizes:
        return None
    taken: set[str] = set()
    spec = []
    for length, name in zip(shape, names, strict=True):
        axes = [a for a in ACTIVATION_AXES.get(name, ()) if a in sizes and a not in taken]
        while axes and length % math.prod(sizes[a] for a in axes):
            axes.pop()
        taken.update(axes)
        spec.append(axes[0] if len(axes) == 1 else tuple(axes) or None)
    return PartitionSpec(*spec)


def constrain(x: Array, *names: str | None) -> Array:
    """`x` with the sharding that its axis names imply on the mesh in context.

    Args:
      x: an activation.
      names: one logical name an axis (see `ACTIVATION_AXES`), None for an axis that stays whole.

    Raises:
      ValueError: if there is not exactly one name an axis.
    """
    if len(names) != x.ndim:
        raise ValueError(
            f"constrain got {len(names)} names, {names}, for an array of shape {x.shape}; "
            "give one name an axis."
        )
    x = materialized(x)
    spec = activation_spec(x.shape, names)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def on_each_device(function: Callable[..., Array], *names: str | None) -> Callable[..., Array]:
    """`function`, applied by each device to its part of the arrays, for what XLA cannot cut.

    Around a Fourier transform, for one, XLA gathers the arrays of all devices on each.

    Args:
      function: from arrays of these axes to one like the first of them.
      names: logical names of the axes; `function` must not mix along those that are named.
    """

    def run(*arrays: Array) -> Array:
        specs = tuple(activation_spec(x.shape, names) for x in arrays)
        if specs[0] is None:
            return function(*arrays)
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return run


def on_any_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` or `init` of a module for any mesh, those with Explicit axes (`jax.make_mesh`) too.

    Explicit axes make every operation say how its result is cut, which neither Linen's layers nor
    ours do. So a model runs with the axes as Auto ones; its results are cut along their first axis
    as the first of its inputs is, where that axis is the batch, and are whole otherwise.
    """

    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or AxisType.Explicit not in mesh.axis_types:
            return function(self, *args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        at = [i for i, t in enumerate(leaves) if isinstance(t, jax.Array | np.ndarray)]

        def call(*arrays: Array) -> Any:
            given = list(leaves)
            for i, t in zip(at, arrays, strict=True):
                given[i] = t
            args, kwargs = jax.tree.unflatten(tree, given)
            return function(self, *args, **kwargs)

        arrays = [leaves[i] for i in at]
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            shapes = jax.eval_shape(call, *(jax.ShapeDtypeStruct(t.shape, t.dtype) for t in arrays))
        inputs = args[1:], {k: v for k, v in kwargs.items() if k not in ("variables", "rngs")}
        batch, axes = _cut_of(jax.tree.leaves(inputs))
        specs = jax.tree.map(
            lambda t: PartitionSpec(axes) if t.shape[:1] == (batch,) else PartitionSpec(), shapes
        )
        return jax.sharding.auto_axes(call, out_sharding=specs)(*arrays)

    return run


def _cut_of(inputs: list[Any]) -> tuple[int | None, Any]:
    """Length of the first axis of an input that is cut along it, and the mesh axes of the cut."""
    for t in inputs:
        if isinstance(t, jax.Array) and t.ndim:
            spec = jax.typeof(t).sharding.spec
            if len(spec) and spec[0] is not None:
                return t.shape[0], spec[0]
    return None, None
