"""Imputation: say what hidden values of a window were."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.apply import apply_model, zeros_like_inputs
from zoo.tasks.forecasting import check_output
from zoo.tasks.metrics import Mean


@dataclass(frozen=True)
class Imputation:
    """Mean squared error (the loss) and mean absolute error of the values that were hidden.

    Batches are those of `zoo.data.series.Windows` with `horizon=0` behind `HideValues`. Any
    forecaster whose horizon is its context length is an imputer. Every hidden value counts the
    same, also over batches.
    """

    def init_inputs(self, model: nn.Module) -> dict[str, Array]:
        """Zeros to initialise the model with."""
        return zeros_like_inputs(model)

    def loss(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        rng: Array | None,
        train: bool,
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The squared error of hidden values; aux has `metrics` and updated `collections`."""
        output, collections = apply_model(model, variables, batch, rng, train)
        metrics = _metrics(model, output, batch)
        return metrics["loss"].compute(), {"metrics": metrics, "collections": collections}

    def metrics(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Mean]:
        """Metrics of one batch, in evaluation mode."""
        output, _ = apply_model(model, variables, batch, None, train=False)
        return _metrics(model, output, batch)

    def predict(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> Float[Array, "batch time variates"]:
        """The window, its hidden values filled in."""
        output, _ = apply_model(model, variables, batch, None, train=False)
        return jnp.where(batch["mask"], batch["series"], output)


def _metrics(model: nn.Module, output: Array, batch: Mapping[str, Array]) -> dict[str, Mean]:
    target, hidden = batch["target"], ~batch["mask"]
    check_output(output, target, model)
    error = (output.astype(jnp.float32) - target).reshape(-1)
    if "valid" in batch:
        hidden &= batch["valid"][:, None, None]
    hidden = hidden.reshape(-1)
    squared, absolute = Mean.of(error**2, hidden), Mean.of(jnp.abs(error), hidden)
    return {"loss": squared, "mse": squared, "mae": absolute}
