"""Invertible layout changes between a published tensor and our parameter.

A `Transform` maps the tensors of a rule's sources to those of its targets, and back. They use
views wherever NumPy can (a transpose costs nothing until it is stored), and they see shapes only
when a rule is checked, so `forward` and `inverse` must not depend on values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Transform:
    """A pair of functions from a list of arrays to a list of arrays.

    Attributes:
      forward: the tensors of the sources, in order -> the parameters of the targets, in order.
      inverse: the other way; `inverse(forward(x)) == x` bit for bit.
      bind: for transforms whose inverse needs to know how many tensors a rule has: called with
        `(number of sources, number of targets)` before use, returns the transform to use.
    """

    forward: Callable[[Arrays], Arrays]
    inverse: Callable[[Arrays], Arrays]
    bind: Callable[[int, int], "Transform"] | None = None

    def bound(self, sources: int, targets: int) -> "Transform":
        """This transform for a rule of so many sources and targets."""
        return self if self.bind is None else self.bind(sources, targets)


def elementwise(
    forward: Callable[[np.ndarray], np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]
) -> Transform:
    """A transform that treats each tensor of the rule alike."""
    return Transform(lambda xs: [forward(x) for x in xs], lambda xs: [inverse(x) for x in xs])


identity = elementwise(lambda x: x, lambda x: x)


def _transpose_matrix(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2:
        raise ValueError(f"a matrix is wanted, not {x.ndim} dimensions")
    return x.T


def _to_channels_last(x: np.ndarray) -> np.ndarray:
    if x.ndim < 3:
        raise ValueError(f"a convolution kernel is wanted, not {x.ndim} dimensions")
    return np.transpose(x, (*range(2, x.ndim), 1, 0))


def _to_channels_first(x: np.ndarray) -> np.ndarray:
    if x.ndim < 3:
        raise ValueError(f"a convolution kernel is wanted, not {x.ndim} dimensions")
    return np.transpose(x, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)))


linear = elementwise(_transpose_matrix, _transpose_matrix)
"""`[out, in]` of torch's Linear <-> `[in, out]` of Flax's Dense kernel."""

conv = elementwise(_to_channels_last, _to_channels_first)
"""`[out, in, *window]` of torch's Conv1d/2d/3d <-> `[*window, in, out]` of Flax's Conv kernel."""


def squeeze(axis: int | tuple[int, ...] = 0) -> Transform:
    """Drops axes of size one: `squeeze(0)` takes `[1, tokens, width]` to `[tokens, width]`."""
    return elementwise(lambda x: np.squeeze(x, axis), lambda x: np.expand_dims(x, axis))


def unsqueeze(axis: int | tuple[int, ...] = 0) -> Transform:
    """Adds axes of size one."""
    return elementwise(lambda x: np.expand_dims(x, axis), lambda x: np.squeeze(x, axis))


def transpose(*axes: int) -> Transform:
    """Permutes the axes as `np.transpose(x, axes)`."""
    back = tuple(int(i) for i in np.argsort(axes))
    return elementwise(lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back))


def reshape(forward: Sequence[int], inverse: Sequence[int]) -> Transform:
    """Reshapes to `forward` (one -1 allowed); `inverse` is the official shape (one -1 allowed).

    Sizes that depend on the model come from a rule whose transform is a function of the model:
    `Rule(..., lambda model: reshape((-1, model.channels), (-1, model.num_heads, 64)))`.
    """
    there, back = tuple(forward), tuple(inverse)
    return elementwise(lambda x: np.reshape(x, there), lambda x: np.reshape(x, back))


def _cut(x: np.ndarray, axis: int, sections: int | Sequence[int]) -> Arrays:
    if isinstance(sections, int):
        return list(np.split(x, sections, axis))  # raises if the axis is not a multiple
    if sum(sections) != x.shape[axis]:
        raise ValueError(f"axis {axis} has {x.shape[axis]} entries, not {sum(sections)}")
    return list(np.split(x, np.cumsum(sections)[:-1], axis))


def _unbound(xs: Arrays) -> Arrays:
    raise TypeError("use transform.bound(sources, targets) first: a Rule does it for you")


def concat(axis: int = 0, sections: Sequence[int] | None = None) -> Transform:
    """Several sources, joined along `axis`, make one target.

    Args:
      axis: of the official tensors as they stand at this point of a `chain`.
      sections: size of each source along `axis`; None: all equal.
    """

    def bind(sources: int, targets: int) -> Transform:
        parts = sources if sections is None else sections
        return Transform(
            lambda xs: [np.concatenate(xs, axis)], lambda xs: _cut(_one(xs), axis, parts)
        )

    return Transform(_unbound, _unbound, bind)


def split(axis: int = 0, sections: Sequence[int] | None = None) -> Transform:
    """One source, cut along `axis`, makes several targets (`sections`: their sizes, else equal)."""

    def bind(sources: int, targets: int) -> Transform:
        parts = targets if sections is None else sections
        return Transform(
            lambda xs: _cut(_one(xs), axis, parts), lambda xs: [np.concatenate(xs, axis)]
        )

    return Transform(_unbound, _unbound, bind)


def stack(axis: int = 0) -> Transform:
    """Several sources of one shape, stacked along a new `axis`, make one target."""
    return Transform(
        lambda xs: [np.stack(xs, axis)],
        lambda xs: [np.take(_one(xs), i, axis) for i in range(_one(xs).shape[axis])],
    )


def _same(xs: Arrays) -> Arrays:
    if any(x.shape != xs[0].shape for x in xs):
        raise ValueError(f"tied tensors differ in shape: {', '.join(str(x.shape) for x in xs)}")
    rows = zip(*(np.atleast_1d(x) for x in xs), strict=True)
    if any(other.tobytes() != row[0].tobytes() for row in rows for other in row[1:]):
        raise ValueError("tied tensors differ in value, so one leaf cannot stand for both")
    return [xs[0]]


def _copies(sources: int, targets: int) -> Transform:
    return Transform(_same, lambda xs: [_one(xs)] * sources)


tied = Transform(_same, lambda xs: [_one(xs)], _copies)
"""Several names of one tensor (an output matrix tied to the embedding): they must be equal."""


def chain(*transforms: Transform) -> Transform:
    """One transform after the other, from the official tensor to ours."""

    def bind(sources: int, targets: int) -> Transform:
        steps = [t.bound(sources, targets) for t in transforms]

        def forward(xs: Arrays) -> Arrays:
            for step in steps:
                xs = step.forward(xs)
            return xs

        def inverse(xs: Arrays) -> Arrays:
            for step in reversed(steps):
                xs = step.inverse(xs)
            return xs

        return Transform(forward, inverse)

    return Transform(_unbound, _unbound, bind)


def _one(xs: Arrays) -> np.ndarray:
    if len(xs) != 1:
        raise ValueError(f"one tensor is wanted here, not {len(xs)}")
    return xs[0]
