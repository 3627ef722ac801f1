"""Anomaly detection: what a model of normal windows cannot reconstruct is an anomaly."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.forecasting import check_output
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


@dataclass(frozen=True)
class AnomalyDetection(OneNetwork):
    """Mean squared error of the reconstruction; `zoo.evaluators.AnomalyScores` scores anomalies.

    Batches are those of `zoo.data.series.Segments`. Any forecaster whose horizon is its context
    length is a reconstructor. The energy of a step is its squared error, averaged over variates.
    """

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """The squared error of the windows."""
        return {"loss": Mean.of(_energy(network, output, batch).mean(1), batch.get("valid"))}

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch time"]]:
        """The energy of every step."""
        output, _ = self.run(networks, variables, batch)
        return {"energy": _energy(networks, output, batch)}


def _energy(network: nn.Module, output: Array, batch: Batch) -> Array:
    series = batch["series"]
    check_output(output, series, network)
    return ((output.astype(jnp.float32) - series) ** 2).mean(-1)
