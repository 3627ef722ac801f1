"""Everything that a step changes, as one pytree."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Int, UInt


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The training state.

    Attributes:
      step: optimizer steps taken.
      params: float32 parameters.
      collections: the model's other collections (`batch_stats`), by name.
      opt_state: of optax.
      ema: running mean of `params`, or None.
      rng: key data of the run's seed; a step uses `fold_in(seed, step)`.
    """

    step: Int[Array, ""]
    params: Any
    collections: Any
    opt_state: Any
    ema: Any
    rng: UInt[Array, "words"]

    def variables(self, averaged: bool = True) -> dict[str, Any]:
        """What `model.apply` takes; the running mean of the parameters where there is one."""
        params = self.ema if averaged and self.ema is not None else self.params
        return {"params": params, **self.collections}
