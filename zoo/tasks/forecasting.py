"""Forecasting: the next steps of every series, from the last ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.layers.series import standardise
from zoo.tasks.apply import apply_model
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, OneNetwork, Variables


def check_output(output: Array, target: Array, model: nn.Module) -> None:
    """Refuse an output of another shape than what it is compared with.

    Raises:
      ValueError: naming both.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"{type(model).__name__} gives {output.shape[1]} steps of {output.shape[2]} variates, "
            f"and the data has {target.shape[1]} of {target.shape[2]}; create it with horizon="
            f"{target.shape[1]} and variates={target.shape[2]}."
        )


@dataclass(frozen=True)
class Forecasting(OneNetwork):
    """Mean squared error (the loss) and mean absolute error, over windows, steps and variates.

    Batches are those of `zoo.data.series.Windows`: the model's inputs and `target`. Values are
    scaled, and so are the errors, as in the literature.

    Attributes:
      target: `all` variates count, or only the `last`, which the others help to forecast (the
        "MS" of the official codes).
    """

    target: Literal["all", "last"] = "all"
    metric: ClassVar[str] = "mse"

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch horizon variates"]]:
        """The forecast of every variate."""
        return {"forecast": self.run(networks, variables, batch)[0]}

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Squared and absolute error of the windows."""
        target = batch["target"]
        check_output(output, target, network)
        error = output.astype(jnp.float32) - target
        error = error[..., -1:] if self.target == "last" else error
        squared = Mean.of((error**2).mean((1, 2)), batch.get("valid"))
        absolute = Mean.of(jnp.abs(error).mean((1, 2)), batch.get("valid"))
        return {"loss": squared, "mse": squared, "mae": absolute}


def decomposition_error(
    parts: Mapping[str, Array], targets: Mapping[str, Float[Array, "batch context variates"]]
) -> Float[Array, "batch"]:
    """How far learned parts of a series are from given ones: the sum of their squared errors.

    Args:
      parts: what a model takes its series apart into, by name; others may be among them.
      targets: what it should be, by the same names; each is standardised first, by itself.
    """
    errors = (parts[name] - standardise(target)[0] for name, target in targets.items())
    return sum((error.astype(jnp.float32) ** 2).mean((1, 2)) for error in errors)


@dataclass(frozen=True)
class DecomposedForecasting(Forecasting):
    """`Forecasting` of a model that learns to take its series apart, and is told how to (TEMPO).

    The loss is the squared error plus `weight` times the `decomposition_error`; the metrics are
    those of `Forecasting`. Batches for training are those of `zoo.data.series.DecomposedWindows`.

    Attributes:
      weight: of the decomposition. TEMPO's code: 0.01, its scripts 0.001.
      parts: features of the model, and what the batch has for each under the same name.
    """

    weight: float = 0.01
    parts: tuple[str, ...] = ("trend", "season", "noise")

    def loss(
        self,
        networks: nn.Module,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """Both errors of the valid windows, weighted.

        Raises:
          ValueError: if the model or the batch lacks a part.
        """
        out, collections = apply_model(networks, variables, batch, rng, True, method="features")
        for place, has in ((f"{type(networks).__name__} gives", out), ("the batch has", batch)):
            if missing := [name for name in self.parts if name not in has]:
                raise ValueError(
                    f"{place} no {missing[0]!r}, which {type(self).__name__} compares; use TEMPO "
                    "and zoo.data.series.DecomposedWindows, or Forecasting."
                )
        error = decomposition_error(out, {name: batch[name] for name in self.parts})
        metrics = self.measure(networks, out["forecast"], batch, True)
        metrics["decomposition"] = Mean.of(error, batch.get("valid"))
        loss = metrics["loss"].compute() + self.weight * metrics["decomposition"].compute()
        return loss, Aux(metrics, collections)
