"""Forecasts of held-out windows, drawn against the truth."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo.evaluators.evaluator import Evaluator, some_examples


@dataclass(frozen=True)
class ForecastPlots(Evaluator):
    """Draws forecasts into `forecasts.png`.

    Attributes:
      windows: how many, spread over the held-out ones.
      every: steps between pictures; 0 is at the end only.
    """

    windows: int = 3
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """The picture; there are no numbers beside the metrics of the task."""
        count = len(data.eval)
        places = np.linspace(0, count - 1, min(count, self.windows)).astype(int).tolist()
        batch = some_examples(data, places)
        forecast = np.asarray(jax.device_get(program.predict(variables, batch)["forecast"]))
        table = getattr(data.eval, "table", None)
        names = table.variates if table else [f"variate {i}" for i in range(forecast.shape[-1])]
        draw_forecasts(folder / "forecasts.png", batch, forecast, names)
        return {}


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
