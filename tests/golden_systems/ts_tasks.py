"""The tasks of Time-Series-Library: scores of anomalies."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

from zoo.tasks.anomaly_detection import point_adjust, scores, threshold


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The protocol of anomaly detection."""
    ratio = case.config.take("anomaly_ratio")

    def detect(_: dict) -> golden.Outputs:
        train, test = case.input("train_energy"), case.input("test_energy")
        labels = case.input("labels").astype(bool)
        limit = threshold(train, test, ratio)
        raw = test > limit
        adjusted = point_adjust(raw, labels)
        return {
            "threshold": limit,
            "pred_raw": raw,
            "pred_adjusted": adjusted,
            "metrics": np.array(list(scores(adjusted, labels).values())),
            "metrics_raw": np.array(list(scores(raw, labels).values())[1:]),
        }

    return None, detect


def made_by(case: golden.Case) -> bool:
    """Whether the header names Time-Series-Library."""
    return case.source.startswith("thuml/Time-Series-Library@")
