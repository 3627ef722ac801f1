"""What happens when a loss or a gradient is not finite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.errors import NonFiniteError
from zoo.tasks.task import Phase
from zoo.training.reductions import first_not_finite


def first_bad(loss: Float[Array, ""], grads: Any) -> Int[Array, ""]:
    """Index in `watched` of the first that is not finite, or -1 if all is."""
    return first_not_finite([loss, *jax.tree.leaves(grads)])


def unless(bad: Int[Array, ""] | int, new: Any, old: Any) -> Any:
    """The new tree, or the old one if something was not finite."""
    return jax.tree.map(lambda n, o: jnp.where(bad < 0, n, o), new, old)


def watched(phases: Sequence[tuple[str, Phase]], assigned: Mapping[str, str | None]) -> list[str]:
    """Names of what `first_bad` looks at in the turns of a step, in its order.

    Args:
      phases: as `zoo.training.step.turns` gives them.
      assigned: path of each leaf, in tree order -> its group.
    """
    names = []
    for prefix, phase in phases:
        names.append(f"the loss of {phase.name}" if prefix else "the loss")
        trained = (path for path, group in assigned.items() if group in phase.groups)
        names += [f"the gradient of {path}" for path in trained]
    return names


@dataclass
class Guard:
    """Decides, on the host, what a bad step leads to.

    Attributes:
      mode: `raise`, `skip` or `rollback`.
      limit: bad steps in a row (`skip`) or rollbacks of the run that are one too many.
      names: of `watched`.
    """

    mode: Literal["raise", "skip", "rollback"]
    limit: int
    names: list[str]
    count: int = 0

    def look(self, step: int, bad: int) -> str | None:
        """None for a good step, else the sentence to show; the step was not applied.

        Raises:
          NonFiniteError: in mode `raise`, or past the limit.
        """
        if bad < 0:
            if self.mode == "skip":
                self.count = 0
            return None
        self.count += 1
        said = f"At step {step} {self.names[bad]} is not finite"
        if self.mode == "raise":
            raise NonFiniteError(
                f"{said}; lower optimizer.learning-rate, set optimizer.clip, or choose --guard "
                "skip or rollback."
            )
        if self.count > self.limit:
            what = "steps in a row" if self.mode == "skip" else "rollbacks"
            raise NonFiniteError(
                f"{said}, and guard_limit={self.limit} {what} are used up; lower "
                "optimizer.learning-rate or set optimizer.clip."
            )
        return f"{said}; " + ("it is left out." if self.mode == "skip" else "going back.")
