"""Forecasting: the next steps of every series, from the last ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.layers.series import standardise
from zoo.tasks.apply import apply_model, zeros_like_inputs
from zoo.tasks.metrics import Mean


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
class Forecasting:
    """Mean squared error (the loss) and mean absolute error, over windows, steps and variates.

    Batches are those of `zoo.data.series.Windows`: the model's inputs and `target`. Values are
    scaled, and so are the errors, as in the literature.

    Attributes:
      target: `all` variates count, or only the `last`, which the others help to forecast (the
        "MS" of the official codes).
    """

    target: Literal["all", "last"] = "all"

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
        """The squared error of the valid windows; aux has `metrics` and updated `collections`."""
        forecast, collections = apply_model(model, variables, batch, rng, train)
        metrics = self._metrics(model, forecast, batch)
        return metrics["loss"].compute(), {"metrics": metrics, "collections": collections}

    def metrics(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Mean]:
        """Metrics of one batch, in evaluation mode."""
        return self._metrics(model, self.predict(model, variables, batch), batch)

    def predict(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> Float[Array, "batch horizon variates"]:
        """The forecast of every variate."""
        return apply_model(model, variables, batch, None, train=False)[0]

    def report(
        self, model: nn.Module, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draw forecasts of held-out windows against the truth, into `forecasts.png`."""
        from zoo.data import eval_batches

        count = len(data.eval)
        places = np.linspace(0, count - 1, min(count, 3)).astype(int).tolist()
        some = replace(data, eval=[data.eval[i] for i in places], eval_batch_size=len(places))
        batch = next(eval_batches(some))
        forecast = jax.jit(lambda v, b: self.predict(model, v, b))(variables, batch)
        table = getattr(data.eval, "table", None)
        names = table.variates if table else [f"variate {i}" for i in range(forecast.shape[-1])]
        draw_forecasts(folder / "forecasts.png", batch, np.asarray(forecast), names)
        return {}

    def _metrics(self, model: nn.Module, forecast: Array, batch: Mapping[str, Array]) -> dict:
        target = batch["target"]
        check_output(forecast, target, model)
        error = forecast.astype(jnp.float32) - target
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
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        rng: Array | None,
        train: bool,
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Both errors of the valid windows, weighted; aux as for every task.

        Raises:
          ValueError: if the model or the batch lacks a part.
        """
        out, collections = apply_model(model, variables, batch, rng, train, method="features")
        for place, has in ((f"{type(model).__name__} gives", out), ("the batch has", batch)):
            if missing := [name for name in self.parts if name not in has]:
                raise ValueError(
                    f"{place} no {missing[0]!r}, which {type(self).__name__} compares; use TEMPO "
                    "and zoo.data.series.DecomposedWindows, or Forecasting."
                )
        error = decomposition_error(out, {name: batch[name] for name in self.parts})
        metrics = self._metrics(model, out["forecast"], batch)
        metrics["decomposition"] = Mean.of(error, batch.get("valid"))
        loss = metrics["loss"].compute() + self.weight * metrics["decomposition"].compute()
        return loss, {"metrics": metrics, "collections": collections}


def draw_forecasts(
    path: Path, batch: Mapping[str, np.ndarray], forecast: np.ndarray, names: Any
) -> None:
    """One panel for each window (across) and variate (down, the first four and the last)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    windows, context, variates = batch["series"].shape
    shown = range(variates) if variates <= 5 else [0, 1, 2, 3, variates - 1]
    figure = Figure(figsize=(4.5 * windows, 2.2 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), windows, squeeze=False, sharex=True)
    past, future = np.arange(-context, 0), np.arange(forecast.shape[1])
    for line, variate in zip(panels, shown, strict=True):
        line[0].set_ylabel(names[variate])
        for i, axes in enumerate(line):
            axes.plot(past, batch["series"][i, :, variate], color="grey", label="seen")
            axes.plot(future, batch["target"][i, :, variate], color="black", label="truth")
            axes.plot(future, forecast[i, :, variate], color="tab:red", label="forecast")
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.supxlabel("steps after the last one seen (values are scaled)")
    figure.savefig(path, dpi=100)
