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
