"""What the recurrences' bodies receive: a static `Problem` and the arrays."""

from dataclasses import dataclass
from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Problem:
    """The static part of a recurrence; hashable.

    Attributes:
      chunk: steps that are done at once, a power of two, at least 16.
      scale: of the output.
      precision: of the large products; sums of decays and the solve always use the highest.
    """

    chunk: int = 64
    scale: float = 1.0
    precision: lax.PrecisionLike = None


class Operands(NamedTuple):
    """Arrays, heads first; the length is a multiple of the chunk, groups divides heads."""

    query: Float[Array, "batch groups length key_dim"]
    key: Float[Array, "batch groups length key_dim"]
    value: Float[Array, "batch heads length value_dim"]
    log_decay: Float[Array, "batch heads length #key_dim"] | None
    beta: Float[Array, "batch heads length 1"] | None
    state: Float[Array, "batch heads key_dim value_dim"]


class Gradients(NamedTuple):
    """Of the operands; None where one is absent."""

    query: Array
    key: Array
    value: Array
    log_decay: Array | None
    beta: Array | None
    state: Array


class ScanOperands(NamedTuple):
    """Arrays; the length is a multiple of the chunk. A, D and the state are float32."""

    x: Float[Array, "batch length channels"]
    dt: Float[Array, "batch length channels"]
    A: Float[Array, "channels state"]
    B: Float[Array, "batch length state"]
    C: Float[Array, "batch length state"]
    D: Float[Array, "channels"] | None
    state: Float[Array, "batch channels state"]


class ScanGradients(NamedTuple):
    """Of the operands, in their types; None where one is absent."""

    x: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    state: Array
