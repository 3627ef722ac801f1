"""Everything that a step changes, as one pytree, and the parts that a checkpoint holds of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
from jaxtyping import Array, Int, UInt

from zoo.training.tree import from_dict, join, to_dict


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The training state.

    Attributes:
      step: optimizer steps taken.
      params: float32 parameters that are trained, as nested dicts.
      frozen: parameters that are not trained; no gradient, moment or average is kept of them.
      collections: the other collections of the networks (`batch_stats`), by name.
      carry: what the task hands from step to step (environments, memories), a row an example.
      opt_state: group -> state of its optimizer, which is keyed by the names of its parts.
      ema: running mean of `params`, or None.
      rng: key data of the run's seed; a step uses `fold_in(seed, step)`.
    """

    step: Int[Array, ""]
    params: Any
    frozen: Any
    collections: Any
    carry: Any
    opt_state: Any
    ema: Any
    rng: UInt[Array, "words"]

    def variables(self, averaged: bool = True) -> dict[str, Any]:
        """What `apply` takes; the running mean of the parameters where there is one."""
        params = self.ema if averaged and self.ema is not None else self.params
        return {"params": join(params, self.frozen), **self.collections}

    def to_parts(self) -> dict[str, Any]:
        """The state as the parts of a checkpoint, each of nested dicts of arrays."""
        parts = {part: to_dict(getattr(self, name)) for part, name in PARTS.items()}
        return {**parts, "progress": {"step": self.step, "rng": self.rng}}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], like: Self) -> Self:
        """The inverse of `to_parts`, with the structure of `like`."""
        fields = {
            name: from_dict(parts.get(part, {}), getattr(like, name))
            for part, name in PARTS.items()
        }
        return cls(step=parts["progress"]["step"], rng=parts["progress"]["rng"], **fields)


PARTS = {
    "params": "params",
    "frozen": "frozen",
    "collections": "collections",
    "carry": "carry",
    "optimizer": "opt_state",
    "ema": "ema",
}
"""Part of a checkpoint -> field of the state."""
