"""Metrics that merge exactly over batches, processes and padding."""

from collections.abc import Mapping

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@flax.struct.dataclass
class Mean:
    """A mean as total and count, so that means of parts merge into the mean of all."""

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, values: Float[Array, "batch"], valid: Bool[Array, "batch"] | None = None) -> "Mean":
        """The mean of the values that are valid (all, if None)."""
        values = values.astype(jnp.float32)
        valid = jnp.ones_like(values) if valid is None else valid.astype(jnp.float32)
        return cls(jnp.where(valid > 0, values, 0.0).sum(), valid.sum())

    def merge(self, other: "Mean") -> "Mean":
        """The mean over both parts."""
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> Float[Array, ""]:
        """The value; zero if nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


def merge(parts: list[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Merge the metrics of several batches, name by name."""
    merged = dict(parts[0])
    for part in parts[1:]:
        merged = {name: mean.merge(part[name]) for name, mean in merged.items()}
    return merged
