"""Error against the number of examples: in-context learners beside what can be known.

Writes `learning_curves.json` and `learning_curves.png` into the run directory, and gives for each
set of prompts the mean of each curve from `after` on, as `set/learner`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.functions import baselines, bayes
from zoo.evaluators.evaluator import Evaluator, predictions

Baseline = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LearningCurves(Evaluator):
    """Curves of the networks and of baselines, on the held-out prompts and on other sets.

    Attributes:
      sets: name -> prompts, beside the held-out ones, which are called `standard`.
      references: name -> baseline, `f(xs [points, dims], ys [points]) -> predictions [points]`, or
        a pair of means and variances for the kind `gaussian`. One whose name has a set's in front,
        as in `taught/teacher`, is drawn there alone.
      kind: of the task: curves of "squared" error over `scale`, of "logistic" accuracy, or of
        "gaussian" negative log likelihood.
      against: what is predicted: `targets`, or the `ys` as shown.
      scale: what squared errors are divided by.
      after: the point from which on curves are averaged into one number.
      prompts: of each set, this many are used.
      every: steps between runs; 0 is at the end only.
    """

    sets: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[str, Baseline] = field(default_factory=dict)
    kind: str = "squared"
    against: str = "targets"
    scale: float = 1.0
    after: int = 0
    prompts: int = 256
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """The two files, and a number for each curve."""
        curves: dict[str, dict[str, list[float]]] = {}
        for name, source in {"standard": data.eval, **self.sets}.items():
            few = dataclasses.replace(data, eval=_First(source, self.prompts))
            batches = list(predictions(program, variables, few))
            joined = [
                {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
                for parts in zip(*batches, strict=True)
            ]
            curves[name] = self._curves(name, *joined)
        (folder / "learning_curves.json").write_text(json.dumps(curves, indent=1) + "\n")
        draw_curves(folder / "learning_curves.png", curves, self.kind)
        return {
            f"{name}/{learner}": float(np.mean(curve[self.after :]))
            for name, of_set in curves.items()
            for learner, curve in of_set.items()
        }

    def _curves(
        self, name: str, batch: Mapping[str, np.ndarray], said: Mapping[str, np.ndarray]
    ) -> dict[str, list[float]]:
        """Learner -> its mean at each point."""
        xs, ys = (batch[key].astype(float) for key in ("xs", "ys"))
        predicted = dict(said)
        for reference, baseline in self.references.items():
            place, _, short = reference.rpartition("/")
            if place in ("", name):
                rows = [baseline(x, y) for x, y in zip(xs, ys, strict=True)]
                predicted[short] = np.stack([_row(row) for row in rows])
        labels = batch[self.against].astype(float)
        return {
            learner: np.mean(self._score(p.astype(float), labels), axis=0).tolist()
            for learner, p in predicted.items()
        }

    def _score(self, p: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if self.kind == "logistic":  # one who says nothing is right half the time
            return np.where(p == 0, 0.5, np.sign(p) == labels)
        if self.kind == "gaussian":
            belief = bayes.Belief(p[..., 0], np.exp(2 * p[..., 1]))
            return bayes.negative_log_likelihood(belief, labels)
        return (p - labels) ** 2 / self.scale


def _row(said: Any) -> np.ndarray:
    """A baseline's answer as a network gives it: means and variances become log deviations."""
    if isinstance(said, bayes.Belief):
        return np.stack([said.mean, 0.5 * np.log(said.variance)], axis=-1)
    return np.asarray(said)


@dataclass(frozen=True)
class _First:
    """The first examples of a source."""

    source: Any
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index]


LABELS = {
    "squared": "squared error",
    "logistic": "accuracy",
    "gaussian": "negative log likelihood",
}
REFERENCES = {
    "least_squares": baselines.least_squares,
    "nearest": baselines.nearest,
    "averaging": baselines.averaging,
}
"""The baselines of Garg et al. for linear functions."""


def draw_curves(path: Path, curves: Mapping[str, Mapping[str, list[float]]], kind: str) -> None:
    """One panel for each set, one line for each learner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (name, of_set) in zip(panels, curves.items(), strict=True):
        for i, (learner, curve) in enumerate(of_set.items()):
            axes.plot(curve, label=learner, color=f"C{i % 10}", linewidth=1.5)
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    if kind == "squared":
        top = max(max(curve) for of_set in curves.values() for curve in of_set.values())
        panels[0].set_ylim(0, min(top, 3.0) * 1.05)
    panels[0].set_ylabel(LABELS[kind])
    figure.supxlabel("examples before")
    figure.savefig(path, dpi=100)
