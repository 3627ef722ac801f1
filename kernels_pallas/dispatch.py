"""Which body runs, and on which piece of the arrays.

The body is chosen by the platform that is compiled for (`lax.platform_dependent`), never by the
process's default device, so that programs for TPU and CUDA can be compiled on any host. Whether a
platform's Pallas body is used at all says `tuning/dispatch.json`, by operation and size; `explain`
tells a caller.

Compilers cannot partition a Pallas kernel. So, with a mesh in context (`jax.set_mesh`), calls are
wrapped in `shard_map`: the batch is split over the mesh axes `BATCH_AXES`, heads over `HEAD_AXES`,
as far as they divide; other mesh axes repeat the work. Attention and the recurrences, which read
along the length, take heads over `SEQUENCE_AXES`: where the length is cut over the mesh axis
`sequence`, an all-to-all gives each device the whole length of its share of the heads, and another
one cuts the result along the length again.
"""

import functools
import importlib.resources
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import AxisType

from kernels_pallas.axes import BATCH_AXES as BATCH_AXES
from kernels_pallas.axes import HEAD_AXES, LENGTH_AXES

IMPLEMENTATIONS = (None, "xla", "pallas_tpu", "pallas_gpu")
PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
SEQUENCE_AXES = (*HEAD_AXES, *LENGTH_AXES)


@dataclass(frozen=True)
class Body:
    """One implementation of an operation.

    Attributes:
      forward: `f(problem, operands) -> results`.
      backward: `f(problem, operands, *results, *cotangents) -> gradients`.
    """

    forward: Callable
    backward: Callable


@dataclass(frozen=True)
class Choice:
    """The bodies by platform (`cpu`, `tpu`, `cuda`), and the one for all others."""

    default: Body
    platforms: tuple[tuple[str, Body], ...] = ()

    def run(self, which: str, problem, *arrays):
        """Run `forward` or `backward` of the body of the platform that is compiled for."""
        per_platform = {
            name: partial(getattr(body, which), problem) for name, body in self.platforms
        }
        default = partial(getattr(self.default, which), problem)
        if not per_platform:
            return default(*arrays)
        return jax.lax.platform_dependent(*arrays, default=default, **per_platform)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose None (by platform), "
            "'xla', 'pallas_tpu' or 'pallas_gpu'."
        )


@functools.cache
def _table() -> dict:
    source = importlib.resources.files("kernels_pallas") / "tuning" / "dispatch.json"
    return json.loads(source.read_text())


def reason_for_xla(operation: str, platform: str, keys: int) -> str | None:
    """Why the table sends a call to XLA on a platform, or None if Pallas runs it."""
    row = _table()[operation][platform]
    if row["min_keys"] is not None and keys >= row["min_keys"]:
        return None
    bound = "any size" if row["min_keys"] is None else f"fewer than {row['min_keys']} keys"
    return f"the table sends {bound} to XLA ({row['why']})"


def mesh_axes() -> dict[str, int]:
    """Sizes of the mesh axes in context over which work may be split; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return {}
    return dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))


def fitting(axes: dict[str, int], wanted: tuple[str, ...], fits: Callable[[int], bool]):
    """`(names, shards)`: those of the wanted mesh axes whose product divides, longest first."""
    names = [name for name in wanted if axes.get(name, 1) > 1]
    while names and not fits(math.prod(axes[name] for name in names)):
        names.pop()
    return tuple(names), math.prod(axes[name] for name in names)


def explain(function: Callable, *arrays, **options) -> str:
    """Which body a call would run on each platform, and why.

    Args:
      function: `kernels_pallas.attention` or `kernels_pallas.window_attention`.
      *arrays: its arrays, or ShapeDtypeStructs of them.
      **options: its keyword arguments.

    Returns:
      One line for each platform.

        >>> import jax, jax.numpy as jnp, kernels_pallas
        >>> x = jax.ShapeDtypeStruct((2, 197, 6, 64), jnp.bfloat16)
        >>> print(kernels_pallas.explain(kernels_pallas.attention, x, x, x).splitlines()[0])
        cpu: xla
    """
    found: list[dict[str, str]] = []
    _listening.append(found)
    try:
        jax.eval_shape(partial(function, **options), *arrays)
    finally:
        _listening.pop()
    return "\n".join(f"{platform}: {line}" for platform, line in found[0].items())


_listening: list[list] = []


def tell(lines: dict[str, str]) -> None:
    """Reports a choice to the `explain` that listens, if one does."""
    if _listening:
        _listening[-1].append(lines)
