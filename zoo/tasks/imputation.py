"""Imputation: say what hidden values of a window were."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.forecasting import check_output
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


@dataclass(frozen=True)
class Imputation(OneNetwork):
    """Mean squared error (the loss) and mean absolute error of the values that were hidden.

    Batches are those of `zoo.data.series.Windows` with `horizon=0` behind `HideValues`. Any
    forecaster whose horizon is its context length is an imputer. Every hidden value counts the
    same, also over batches.
    """

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Squared and absolute error of hidden values."""
        return _metrics(network, output, batch)

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch time variates"]]:
        """The window, its hidden values filled in."""
        output, _ = self.run(networks, variables, batch)
        return {"series": jnp.where(batch["mask"], batch["series"], output)}


def _metrics(model: nn.Module, output: Array, batch: Mapping[str, Array]) -> dict[str, Mean]:
    target, hidden = batch["target"], ~batch["mask"]
    check_output(output, target, model)
    error = (output.astype(jnp.float32) - target).reshape(-1)
    if "valid" in batch:
        hidden &= batch["valid"][:, None, None]
    hidden = hidden.reshape(-1)
    squared, absolute = Mean.of(error**2, hidden), Mean.of(jnp.abs(error), hidden)
    return {"loss": squared, "mse": squared, "mae": absolute}
