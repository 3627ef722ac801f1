"""Regression: one number for an example."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, OneNetwork, Variables


@dataclass(frozen=True)
class Regression(OneNetwork):
    """Absolute or squared error of a number; `zoo.evaluators.ConformalIntervals` gives intervals.

    Batches have the model's inputs and `target [batch]`.

    Attributes:
      error: what the loss is a mean of.
      penalties: features of the model that are losses themselves, and their weights.
    """

    error: Literal["absolute", "squared"] = "absolute"
    penalties: tuple[tuple[str, float], ...] = ()
    metric: ClassVar[str] = "mae"
    method: ClassVar[str] = "features"

    def check(
        self, networks: nn.Module, batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Refuse targets that are not one finite number an example.

        Raises:
          ValueError: naming what they are.
        """
        super().check(networks, batch, outputs)
        if "target" not in batch:
            has = ", ".join(name for name in batch if name != "valid")
            raise ValueError(f"Regression needs a target of each example; they have only {has}.")
        target = np.asarray(batch["target"])
        if target.dtype.kind not in "fiub":
            raise ValueError(f"Targets are {target.dtype}, such as {target.reshape(-1)[0]!r}.")
        if target.ndim != 1:
            raise ValueError(
                f"Targets have the shape {list(target.shape)}; a target is one number, so that a "
                f"batch has [{len(target)}]: target.reshape(-1)."
            )
        if not np.isfinite(target).all():
            count = int((~np.isfinite(target)).sum())
            raise ValueError(f"{count} of {len(target)} targets are not finite; leave them out.")

    def loss(
        self,
        networks: nn.Module,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The error of the valid examples and the penalties."""
        out, collections = self.run(networks, variables, batch, rng)
        metrics = self.measure(networks, out, batch, True)
        loss = metrics["loss"].compute()
        for name, weight in self.penalties:
            loss = loss + weight * out[name].astype(jnp.float32).mean()
        return loss, Aux(metrics, collections)

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Absolute and squared error."""
        error = _numbers(network, output["logits"]) - batch["target"]
        valid = batch.get("valid")
        absolute, squared = Mean.of(jnp.abs(error), valid), Mean.of(error**2, valid)
        loss = {"absolute": absolute, "squared": squared}[self.error]
        return {"loss": loss, "mae": absolute, "mse": squared}

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch"]]:
        """The numbers."""
        output, _ = self.run(networks, variables, batch)
        return {"number": _numbers(networks, output["logits"])}


def _numbers(model: nn.Module, output: Array) -> Float[Array, "batch"]:
    if output.ndim != 2 or output.shape[1] != 1:
        raise ValueError(
            f"{type(model).__name__} gives outputs of shape {output.shape}; regression is of one "
            "number an example, (batch, 1): create it with num_classes=1, if it has such a field."
        )
    return output[:, 0].astype(jnp.float32)
