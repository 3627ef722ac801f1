"""What every neighbourhood body receives: a static `Problem` and the arrays `Operands`."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from kernels_pallas.neighborhood.geometry import Axis


@dataclass(frozen=True)
class Problem:
    """The static part of a call; hashable, so it can key compiled code.

    Attributes:
      axes: the grid, one entry an axis of space.
      scale: multiplies q.k.
      precision: of the matrix products, as in `jax.lax.dot_general`.
    """

    axes: tuple[Axis, ...]
    scale: float
    precision: jax.lax.PrecisionLike = None

    @property
    def positions(self) -> int:
        """Of the grid."""
        return math.prod(a.size for a in self.axes)


class Operands(NamedTuple):
    """Arrays as callers hold them: heads after space."""

    query: Float[Array, "batch *space heads head_dim"]
    key: Float[Array, "batch *space heads head_dim"]
    value: Float[Array, "batch *space heads value_dim"]
    bias: Float[Array, "heads *rows"] | None = None


def space_to_batch(axes: tuple[Axis, ...], t):
    """Residue classes as images: `[b, *space, ...]` -> `[b * dilations, *members, ...]`."""
    if all(a.dilation == 1 for a in axes):
        return t
    widths = [(0, a.dilation * a.members - a.size) for a in axes]
    rank, rest = len(axes), t.shape[1 + len(axes) :]
    t = jax.numpy.pad(t, [(0, 0), *widths, *[(0, 0)] * len(rest)])
    t = t.reshape(t.shape[0], *(n for a in axes for n in (a.members, a.dilation)), *rest)
    members, residues = (range(1 + i, 1 + 2 * rank, 2) for i in range(2))
    t = t.transpose(0, *residues, *members, *range(1 + 2 * rank, t.ndim))
    return t.reshape(-1, *(a.members for a in axes), *rest)


def batch_to_space(axes: tuple[Axis, ...], t):
    """The inverse of `space_to_batch`."""
    if all(a.dilation == 1 for a in axes):
        return t
    rank, rest = len(axes), t.shape[1 + len(axes) :]
    t = t.reshape(-1, *(a.dilation for a in axes), *(a.members for a in axes), *rest)
    order = [axis for i in range(rank) for axis in (1 + rank + i, 1 + i)]
    t = t.transpose(0, *order, *range(1 + 2 * rank, t.ndim))
    t = t.reshape(t.shape[0], *(a.members * a.dilation for a in axes), *rest)
    return t[(slice(None), *(slice(a.size) for a in axes))]
