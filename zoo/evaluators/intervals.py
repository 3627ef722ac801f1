"""Prediction intervals of a regression, and how well they hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from zoo.evaluators.conformal import covered, near_radii
from zoo.evaluators.evaluator import Evaluator, predictions

HALVINGS = 50  # of the held-out examples, over which coverage is averaged


@dataclass(frozen=True)
class ConformalIntervals(Evaluator):
    """R2 of the held-out numbers, and how intervals hold them; drawn into `regression.png`.

    Batches may have `group [batch]`, a number: intervals of an example come from the errors of
    examples of its group and near ones.

    Attributes:
      coverage: part of the truths that intervals are to hold.
      least: examples that an interval comes from, at least.
      every: steps between measurements; 0 is at the end only.
    """

    coverage: float = 0.9
    least: int = 100
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """R2, coverage and mean radius.

        One half of the held-out examples, drawn at random, gives the errors from which the other
        half gets its intervals: coverage is the mean over 50 such draws, `radius` half the mean
        width of the finite ones.
        """
        rows = []
        for batch, said in predictions(program, variables, data):
            group = batch.get("group", np.zeros(len(batch["target"])))
            rows.append(np.stack([batch["target"], said["number"], group], -1))
        truth, guess, group = np.concatenate(rows).astype(np.float64).T
        found, radii = intervals(truth, guess, group, self.coverage, self.least)
        _draw(folder / "regression.png", truth, guess, group, radii)
        spread = ((truth - truth.mean()) ** 2).sum()
        return {"r2": 1 - float(((truth - guess) ** 2).sum() / spread), **found}


def intervals(
    truth: Float[np.ndarray, "k"],
    guess: Float[np.ndarray, "k"],
    group: Float[np.ndarray, "k"],
    coverage: float = 0.9,
    least: int = 100,
) -> tuple[dict[str, float], Float[np.ndarray, "k"]]:
    """Coverage of conformal intervals, averaged over random halvings, and their mean radius.

    Also a radius for each example, from the last halvings that did not calibrate on it.
    """
    rng, shares, radii = np.random.default_rng(0), [], np.full(len(truth), np.nan)
    for _ in range(HALVINGS):
        order = rng.permutation(len(truth))
        known, new = np.split(order, [len(order) // 2])
        errors = truth[known] - guess[known]
        radii[new] = near_radii(errors, group[known], group[new], coverage, least)
        shares.append(covered(truth[new], guess[new], radii[new]))
    finite = radii[np.isfinite(radii)]
    mean = float(finite.mean()) if len(finite) else float("inf")
    return {"coverage": float(np.mean(shares)), "radius": mean}, radii


def _draw(path: Path, truth: Any, guess: Any, group: Any, radii: Any) -> None:
    """Predictions with their intervals against truths, coloured by group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = np.linspace(0, len(truth) - 1, min(len(truth), 2000)).astype(int)
    length = np.where(np.isfinite(radii), radii, 0)
    axes.errorbar(truth[shown], guess[shown], length[shown], fmt="none", ecolor="lightgrey")
    points = axes.scatter(truth[shown], guess[shown], c=group[shown], s=6, zorder=2)
    axes.axline((truth.mean(), truth.mean()), slope=1, color="grey", linewidth=0.8)
    axes.set(xlabel="truth", ylabel="prediction, and the interval of it")
    if len(np.unique(group)) > 1:
        figure.colorbar(points, label="group")
    figure.savefig(path, dpi=100)
