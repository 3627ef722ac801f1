"""Anomaly detection: what a model of normal windows cannot reconstruct is an anomaly.

The protocol of github.com/thuml/Time-Series-Library, whose papers report the adjusted F1. Point
adjustment counts a whole span as found if one of its points is, which flatters: random scores reach
a high F1 that way. The raw scores stand beside the adjusted ones. The threshold looks at the scores
of the test too, as it does there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.tasks.apply import apply_model, zeros_like_inputs
from zoo.tasks.forecasting import check_output
from zoo.tasks.metrics import Mean


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
class AnomalyDetection:
    """Mean squared error of the reconstruction; scores of anomalies at the end of a run.

    Batches are those of `zoo.data.series.Segments`. Any forecaster whose horizon is its context
    length is a reconstructor. The energy of a step is its squared error, averaged over variates.

    Attributes:
      anomaly_ratio: per cent of steps that are to be above the threshold. Official scripts: 1; SMD
        0.5.
    """

    anomaly_ratio: float = 1.0

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
        output, collections = apply_model(model, variables, batch, rng, train)
        metrics = {"loss": Mean.of(_energy(model, output, batch).mean(1), batch.get("valid"))}
        return metrics["loss"].compute(), {"metrics": metrics, "collections": collections}

    def metrics(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Mean]:
        """Metrics of one batch, in evaluation mode."""
        energy = self.predict(model, variables, batch).mean(1)
        return {"loss": Mean.of(energy, batch.get("valid"))}

    def predict(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> Float[Array, "batch time"]:
        """The energy of every step."""
        output, _ = apply_model(model, variables, batch, None, train=False)
        return _energy(model, output, batch)

    def report(
        self, model: nn.Module, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Scores of the held-out steps, raw and adjusted, and `anomalies.png`.

        Raises:
          ValueError: if the held-out windows have no labels.
        """
        from zoo.data import eval_batches

        energy = jax.jit(lambda v, b: self.predict(model, v, b))

        def measure(source: Any) -> tuple[np.ndarray, np.ndarray | None]:
            energies, labels = [], []
            for batch in eval_batches(replace(data, eval=source)):
                valid = batch["valid"]
                energies.append(np.asarray(energy(variables, batch))[valid].reshape(-1))
                labels.append(batch["anomalies"][valid].reshape(-1) if "anomalies" in batch else [])
            return np.concatenate(energies), np.concatenate(labels).astype(bool)

        train, _ = measure(data.train)
        test, anomalous = measure(data.eval)
        if len(anomalous) != len(test):
            raise ValueError(
                f"{data.eval!r} says of no step whether it is anomalous; give its table labels=."
            )
        limit = threshold(train, test, self.anomaly_ratio)
        raw = test > limit
        adjusted = point_adjust(raw, anomalous)
        _draw(folder / "anomalies.png", test, anomalous, limit)
        return {
            "threshold": limit,
            **{f"raw_{k}": v for k, v in scores(raw, anomalous).items()},
            **{f"adjusted_{k}": v for k, v in scores(adjusted, anomalous).items()},
        }


def _energy(model: nn.Module, output: Array, batch: Mapping[str, Array]) -> Array:
    series = batch["series"]
    check_output(output, series, model)
    return ((output.astype(jnp.float32) - series) ** 2).mean(-1)


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
