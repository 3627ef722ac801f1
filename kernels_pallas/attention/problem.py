"""What every attention body receives: a static `Problem` and the arrays `Operands`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, UInt32

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
    """

    mask: Callable | None = None
    score: Score = Softmax()  # noqa: RUF009 (frozen)
    scale: float = 1.0
    dropout: float = 0.0
    precision: jax.lax.PrecisionLike = None


class Operands(NamedTuple):
    """Arrays, heads first. `bias_batch` divides batch: example b uses row `b % bias_batch`."""

    query: Float[Array, "batch heads queries head_dim"]
    key: Float[Array, "batch kv_heads keys head_dim"]
    value: Float[Array, "batch kv_heads keys value_dim"]
    bias: Float[Array, "bias_batch #heads queries keys"] | Bool[Array, "..."] | None = None
    slopes: Float[Array, "heads"] | None = None
    query_segments: Int[Array, "batch queries"] | None = None
    key_segments: Int[Array, "batch keys"] | None = None
    seeds: UInt32[Array, "batch heads"] | None = None


class Gradients(NamedTuple):
    """Of the float operands; None where the operand is absent or boolean."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    slopes: Array | None
