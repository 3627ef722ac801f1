"""What every attention body receives: a static `Problem` and the arrays `Operands`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels_pallas.masks import Mask
from kernels_pallas.scores import Score, Softmax


@dataclass(frozen=True)
class Problem:
    """The static part of a call; hashable, so it can key compiled code.

    Attributes:
      mask: `f(q_index, k_index) -> bool`, or None for full visibility.
      score: how scores become weights.
      scale: multiplies q.k.
      dropout: rate on the weights.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      offset: added to the query's index before masks, modifiers and slopes see it.
      arrays: whether mask or modifier close over arrays, which kernels cannot.
    """

    mask: Callable | None = None
    score: Score = Softmax()  # noqa: RUF009 (frozen)
    scale: float = 1.0
    dropout: float = 0.0
    precision: jax.lax.PrecisionLike = None
    offset: int = 0
    arrays: bool = False

    @property
    def table_mask(self) -> Callable | None:
        """What tells on the host which blocks are seen; None where all may be."""
        if self.mask is None or isinstance(self.mask, Captured):
            return None
        return Shifted(self.mask, self.offset) if self.offset else self.mask

    @property
    def place(self) -> int:
        """Of query 0 among the keys, for modifiers and slopes; masks know it themselves."""
        return self.mask.position if isinstance(self.mask, Mask) else 0

    def bound(self, captured):
        """The problem whose mask and modifier have what they close over."""
        if captured is None:
            return self
        mask, modify, captured = self.mask, self.score.modify, list(captured)
        if isinstance(mask, Captured):
            mask, captured = mask.bound(captured)
        if isinstance(modify, Captured):
            modify, captured = modify.bound(captured)
        return replace(self, mask=mask, score=replace(self.score, modify=modify))


@dataclass(frozen=True)
class Shifted(Mask):
    """A mask whose queries start at a later place."""

    mask: Callable
    offset: int

    def __call__(self, q_index, k_index):
        """Visibility, query indices counted from zero."""
        return self.mask(q_index + self.offset, k_index)

    def blocks(self, q_first, q_last, k_first, k_last):
        """Those of the mask."""
        if not isinstance(self.mask, Mask):
            return None
        return self.mask.blocks(q_first + self.offset, q_last + self.offset, k_first, k_last)


@dataclass(frozen=True)
class Captured:
    """A function that closes over traced values, taken apart: the values are operands."""

    jaxpr: object  # hashed by identity
    count: int

    def bound(self, captured):
        """The function with its values, and the values that are left."""
        own, rest = captured[: self.count], captured[self.count :]
        jaxpr = self.jaxpr

        def function(*arguments):
            return _elementwise(lambda *a: jax.core.eval_jaxpr(jaxpr, own, *a)[0], arguments)

        return function, rest


def _elementwise(function, arguments):
    """A function of scalars on arrays that broadcast, each axis mapped where an array has it."""
    shape = jnp.broadcast_shapes(*(t.shape for t in arguments))
    if not shape:
        return function(*arguments)
    axes = tuple(0 if t.ndim == len(shape) and t.shape[0] != 1 else None for t in arguments)
    inner = [
        t[0] if t.ndim == len(shape) and axis is None else t
        for t, axis in zip(arguments, axes, strict=True)
    ]
    if all(axis is None for axis in axes):
        return _elementwise(function, inner)[None]
    return jax.vmap(lambda *a: _elementwise(function, a), in_axes=axes)(*inner)


def capture(function: Callable | None, *types):
    """`(function, values, arrays)`: taken apart if it closes over traced values.

    Args:
      function: elementwise, of scalars of these types.
      *types: of its arguments.

    Returns:
      The function or a `Captured`; the traced values; whether it closes over arrays at all.
    """
    if function is None or (isinstance(function, Mask) and _is_static(function)):
        return function, [], False
    examples = [jax.ShapeDtypeStruct((), dtype) for dtype in types]
    closed = jax.make_jaxpr(function)(*examples)
    values = list(closed.consts)
    if any(isinstance(t, jax.core.Tracer) for t in values):
        return Captured(closed.jaxpr, len(values)), values, True
    return function, [], any(jnp.ndim(t) > 0 for t in values)


def _is_static(mask: Mask) -> bool:
    """Whether a declarative mask holds plain numbers only."""
    try:
        hash(mask)
    except TypeError:
        return False
    return True


class Operands(NamedTuple):
    """Arrays, heads first. `bias_batch` divides batch: example b uses row `b % bias_batch`."""

    query: Float[Array, "batch heads queries head_dim"]
    key: Float[Array, "batch kv_heads keys head_dim"]
    value: Float[Array, "batch kv_heads keys value_dim"]
    bias: Float[Array, "bias_batch #heads #queries #keys"] | Bool[Array, "..."] | None = None
    slopes: Float[Array, "heads"] | None = None
    query_segments: Int[Array, "batch queries"] | None = None
    key_segments: Int[Array, "batch keys"] | None = None
    seeds: UInt32[Array, "batch heads"] | None = None
    offsets: Int[Array, "batch"] | None = None
    captured: tuple | None = None


def hides(problem: Problem, x: Operands) -> bool:
    """Whether a key may be hidden from a query, and a row see no key at all."""
    hiding = (problem.mask, x.bias, x.query_segments, problem.score.modify)
    return any(t is not None for t in hiding)


def apart(problem: Problem, x: Operands, d_out):
    """`(x, d_out)` with finite gradients, and NaN for the queries of rows where they were not.

    So what is not finite reaches the gradients of what a row sees, and of nothing else: zero
    weights times NaN would be NaN.
    """
    d_out = d_out.astype(x.value.dtype)
    if not hides(problem, x):
        return x, d_out
    good = jnp.isfinite(d_out)
    query = jnp.where(good.all(-1, keepdims=True), x.query, jnp.nan)
    return x._replace(query=query), jnp.where(good, d_out, 0)


class Gradients(NamedTuple):
    """Of the operands; None where one is absent or no float."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    slopes: Array | None
    query_segments: None = None
    key_segments: None = None
    seeds: None = None
    offsets: None = None
    captured: tuple | None = None
