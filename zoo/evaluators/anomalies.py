"""Scores of anomalies over a whole test series.

The protocol of github.com/thuml/Time-Series-Library, whose papers report the adjusted F1. Point
adjustment counts a whole span as found if one of its points is, which flatters: random scores reach
a high F1 that way. The raw scores stand beside the adjusted ones. The threshold looks at the scores
of the test too, as it does there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from zoo.evaluators.evaluator import Evaluator, predictions


def point_adjust(
    predicted: Bool[np.ndarray, "steps"], anomalous: Bool[np.ndarray, "steps"]
) -> Bool[np.ndarray, "steps"]:
    """Predictions with every anomalous span filled of which a point was predicted."""
    predicted, anomalous = np.asarray(predicted, bool), np.asarray(anomalous, bool)
    adjusted = predicted.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], anomalous, [0]])))
    for start, stop in edges.reshape(-1, 2):
        adjusted[start:stop] |= predicted[start:stop].any()
    adjusted[:1] = predicted[:1]  # the official loop goes back to step 1, never to step 0
    return adjusted


def scores(
    predicted: Bool[np.ndarray, "steps"], anomalous: Bool[np.ndarray, "steps"]
) -> dict[str, float]:
    """Accuracy, precision, recall and F1; a ratio of nothing is 0."""
    hits = float(np.sum(predicted & anomalous))
    precision = hits / max(1.0, float(np.sum(predicted)))
    recall = hits / max(1.0, float(np.sum(anomalous)))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    accuracy = float(np.mean(predicted == anomalous))
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def threshold(
    train_energy: Float[np.ndarray, "train"],
    test_energy: Float[np.ndarray, "test"],
    anomaly_ratio: float,
) -> float:
    """The energy that `anomaly_ratio` per cent of all steps, training and test, are above."""
    return float(np.percentile(np.concatenate([train_energy, test_energy]), 100 - anomaly_ratio))


@dataclass(frozen=True)
class AnomalyScores(Evaluator):
    """Accuracy, precision, recall and F1 of the held-out steps, raw and adjusted.

    Attributes:
      anomaly_ratio: per cent of steps that are to be above the threshold. Official scripts: 1; SMD
        0.5.
      every: steps between measurements; 0 is at the end only.
    """

    anomaly_ratio: float = 1.0
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """The scores, and `anomalies.png`; without labels the threshold and how much is above."""

        def measure(source: Any) -> tuple[np.ndarray, np.ndarray]:
            energies, labels = [], []
            for batch, said in predictions(program, variables, replace(data, eval=source)):
                energies.append(said["energy"].reshape(-1))
                labels.append(batch["anomalies"].reshape(-1) if "anomalies" in batch else [])
            return np.concatenate(energies), np.concatenate(labels).astype(bool)

        train, _ = measure(data.train)
        test, anomalous = measure(data.eval)
        limit = threshold(train, test, self.anomaly_ratio)
        raw = test > limit
        if len(anomalous) != len(test):  # there are no labels, as there seldom are
            _draw(folder / "anomalies.png", test, np.zeros(len(test), bool), limit)
            return {"threshold": limit, "share_above": float(raw.mean())}
        adjusted = point_adjust(raw, anomalous)
        _draw(folder / "anomalies.png", test, anomalous, limit)
        return {
            "threshold": limit,
            **{f"raw_{k}": v for k, v in scores(raw, anomalous).items()},
            **{f"adjusted_{k}": v for k, v in scores(adjusted, anomalous).items()},
        }


def _draw(path: Path, energy: np.ndarray, anomalous: np.ndarray, limit: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    stride = max(1, len(energy) // 20_000)
    steps = np.arange(0, len(energy), stride)
    axes.plot(steps, energy[::stride], linewidth=0.6, label="energy")
    axes.axhline(limit, color="tab:red", label="threshold")
    spans = anomalous[::stride]
    axes.fill_between(steps, 0, 1, spans, transform=axes.get_xaxis_transform(), alpha=0.3,
                      color="tab:orange", label="anomalous")  # fmt: skip
    axes.set(yscale="log", xlabel="step of a window")
    axes.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=100)
