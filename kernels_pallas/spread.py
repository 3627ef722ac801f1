"""A call cut over a mesh: each device computes its share of the batch and of the heads.

Compilers cannot partition a Pallas kernel, and partition a loop over blocks badly. So a call runs
inside `jax.shard_map` over every mesh axis that is not manual yet.

How work is divided follows the arrays where the mesh axes are Explicit (`jax.make_mesh`'s
default): the batch and the heads stay cut as the first operand is. Auto axes are divided by name,
as far as they divide the sizes: the batch over `BATCH_AXES`, heads over the axes that an operation
names. What reads along a length takes heads over `SEQUENCE_AXES`: where the length is cut over a
mesh axis, an all-to-all gives each device the whole length of its share of the heads, and another
one cuts the result along the length again. Axes that nothing is divided over repeat the work.

The mesh is the one in context, or else the one that the arrays lie on.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.axes import BATCH_AXES, LENGTH_AXES
from kernels_pallas.axes import HEAD_AXES as HEAD_AXES

SEQUENCE_AXES = (*HEAD_AXES, *LENGTH_AXES)


def mesh_of(arrays):
    """The mesh of a call: the one in context, else that of the arrays; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh
    for t in arrays:
        sharding = getattr(jax.typeof(t), "sharding", None)
        if sharding is not None and not sharding.mesh.empty:
            return sharding.mesh
    return None


def free_axes(mesh) -> dict[str, AxisType]:
    """The axes of a mesh over which work may be divided, and their types."""
    if mesh is None or mesh.size == 1:
        return {}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: kind for name, kind in types.items() if kind != AxisType.Manual}


def fitting(axes: dict[str, int], wanted: tuple[str, ...], fits: Callable[[int], bool]):
    """`(names, shards)`: those of the wanted mesh axes whose product divides, longest first."""
    names = [name for name in wanted if axes.get(name, 1) > 1]
    while names and not fits(math.prod(axes[name] for name in names)):
        names.pop()
    return tuple(names), math.prod(axes[name] for name in names)


def _entries(t) -> list[tuple[str, ...]]:
    """The Explicit mesh axes that cut each axis of an array."""
    spec = jax.typeof(t).sharding.spec
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    return entries + [()] * (len(t.shape) - len(entries))


def divisions(arrays, letters: str, *, batch, heads, head_axes) -> tuple[tuple, tuple, int]:
    """Mesh axes of the batch and of the heads, and how many pieces the heads come in.

    Args:
      arrays: of the call; the first is cut as `letters` say: b batch, h heads, l length.
      letters: one for each axis of the first array.
      batch: whether a number of pieces divides the batch.
      heads: whether a number of pieces divides the heads.
      head_axes: names of Auto axes for heads.
    """
    mesh = mesh_of(arrays)
    free = free_axes(mesh)
    if not free:
        return (), (), 1
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    auto = [name for name, kind in free.items() if kind == AxisType.Auto]
    entries = list(zip(letters, _entries(arrays[0]), strict=True))
    explicit = {
        letter: tuple(n for own, e in entries if own in letter for n in e if n in free)
        for letter in ("b", "hl")
    }

    def names(own, wanted, fits):
        wanted = (*own, *(n for n in wanted if n in auto and n not in own))
        return fitting(sizes, wanted, fits)

    wanted = tuple(n for n in head_axes if n not in explicit["b"])
    h, pieces = names(explicit["hl"], wanted, heads)
    b, _ = names(explicit["b"], tuple(n for n in BATCH_AXES if n not in h), batch)
    return b, h, pieces


def spread(function: Callable, operands, layout, results, b: tuple, h: tuple):
    """`function(operands)` with each device on its share.

    Args:
      function: of a NamedTuple of arrays and Nones; returns a tuple.
      operands: the NamedTuple.
      layout: alike, with a string for each array: b for an axis that is cut with the batch, h with
        the heads, else whole, as is the rest of a longer array.
      results: a string for each result; l marks a length that may have been cut.
      b: mesh axes of the batch, from `divisions`.
      h: of the heads.
    """
    arrays = jax.tree.leaves(operands)
    mesh = mesh_of(arrays)
    free = free_axes(mesh)
    if not free:
        return function(operands)
    cut = {"b": b, "h": h}
    explicit = [name for name, kind in free.items() if kind == AxisType.Explicit]

    def spec(letters, among=None):
        names = ([n for n in cut.get(x, ()) if among is None or n in among] for x in letters)
        return PartitionSpec(*(tuple(n) or None for n in names))

    specs = jax.tree.map(spec, layout)
    if explicit:
        wanted = jax.tree.map(lambda x: spec(x, explicit), layout)
        operands = jax.tree.map(jax.sharding.reshard, operands, wanted)
    known = {} if not jax.sharding.get_abstract_mesh().empty else {"mesh": mesh}
    before = list(zip(results[0], _entries(arrays[0]), strict=False)) if explicit else []
    call = jax.shard_map(
        function,
        in_specs=(specs,),
        out_specs=tuple(map(spec, results)),
        axis_names=set(free),
        **known,
    )
    found = call(operands)
    if any(letter == "l" and entry for letter, entry in before):  # cut the length again
        again = {letter: tuple(n for n in entry if n in explicit) for letter, entry in before}
        back = (PartitionSpec(*(again.get(x, ()) or None for x in r)) for r in results)
        found = tuple(map(jax.sharding.reshard, found, back))
    return found
