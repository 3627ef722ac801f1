"""Windows of a table: to forecast from, to take apart, to reconstruct, to fill in."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from zoo.data.series.dates import TIME_FEATURES
from zoo.data.series.table import Table
from zoo.kinds import check_kinds


@dataclass(frozen=True)
class Windows:
    """Every window of a split: what was seen, and what came next, scaled.

    An example has `series [context_length, variates]` and `target [horizon, variates]`; with time
    features also `time_features` and `future_time_features`, `[steps, features]`.

    Attributes:
      table: the rows.
      split: `train`, `val` or `test`.
      context_length: steps that are seen.
      horizon: steps to forecast; 0: there is no target (imputation).
      time_features: of the dates: `features` (numbers within 0.5 of zero), `calendar` (integers),
        or None.

    Raises:
      ValueError: if the split is shorter than a window.
    """

    table: Table
    split: str = "train"
    context_length: int = 96
    horizon: int = 96
    time_features: Literal["features", "calendar"] | None = "features"

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.context_length < 1 or self.horizon < 0:
            raise ValueError(
                f"context_length={self.context_length} and horizon={self.horizon} are steps; give "
                "at least 1 and 0."
            )
        start, stop = self.table.rows(self.split)
        if len(self) < 1 or self._first < 0:
            raise ValueError(
                f"Rows {start} to {stop} of {str(self.table.path)!r}, split {self.split!r}, hold "
                f"no window of {self.context_length} + {self.horizon} steps; choose shorter ones."
            )

    @property
    def _first(self) -> int:
        start, _ = self.table.rows(self.split)
        return start if self.split == "train" else start - self.context_length

    def __len__(self) -> int:
        _, stop = self.table.rows(self.split)
        return max(0, stop - self._first - self.context_length - self.horizon + 1)

    @functools.cached_property
    def _time_features(self) -> np.ndarray | None:
        if not self.time_features:
            return None
        return TIME_FEATURES[self.time_features](self.table.dates, self.table.frequency)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no window {index} of {len(self)}.")
        start = self._first + index
        middle = start + self.context_length
        stop = middle + self.horizon
        example = {"series": self.table.scaled[start:middle]}
        if self.horizon:
            example["target"] = self.table.scaled[middle:stop]
        if self._time_features is not None:
            example["time_features"] = self._time_features[start:middle]
            if self.horizon:
                example["future_time_features"] = self._time_features[middle:stop]
        return example


@dataclass(frozen=True)
class DecomposedWindows(Windows):
    """Windows that also have `trend`, `season` and `noise` of what was seen, `[context, variates]`.

    Their sum is `series`. They are parts of the whole column up to the end of the split, by STL
    (Cleveland et al., 1990) of the package statsmodels; the code of TEMPO, which needs them as
    targets, decomposes the rows of later splits, too.

    Attributes:
      period: steps of the season. TEMPO: 24 for hours, 96 for quarters of an hour.

    Raises:
      FileNotFoundError: without the package, when the first window is read.
    """

    period: int = 24

    @functools.cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        try:
            from statsmodels.tsa.seasonal import STL
        except ImportError:
            raise FileNotFoundError(
                "STL is in the package statsmodels, which is not installed: pip install statsmodels"
            ) from None
        _, stop = self.table.rows(self.split)
        each = [STL(x, self.period).fit() for x in self.table.scaled[:stop].T.astype(np.float64)]
        names = {"trend": "trend", "season": "seasonal", "noise": "resid"}
        return {
            ours: np.stack([getattr(one, theirs) for one in each], 1).astype(np.float32)
            for ours, theirs in names.items()
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        start = self._first + index
        rows = slice(start, start + self.context_length)
        return example | {name: part[rows] for name, part in self._parts.items()}


@dataclass(frozen=True)
class Segments:
    """Windows to reconstruct, for anomaly detection: `series [length, variates]`, scaled.

    With labelled tables also `anomalies bool [length]`. A split begins at its own first row.

    Attributes:
      table: the rows.
      split: `train`, `val` or `test`; None: all rows.
      length: steps of a window.
      step: rows from one window to the next. Time-Series-Library has 1, so that windows overlap
        and each row counts up to `length` times, but 100 for SMD.
      fitted_on: the table whose training rows give the scale; None: `table`.
    """

    table: Table
    split: str | None = "train"
    length: int = 100
    step: int = 1
    fitted_on: Table | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.length < 1 or self.step < 1:
            raise ValueError(
                f"length={self.length} and step={self.step} are rows; give at least 1 of each."
            )
        if len(self) < 1:
            start, stop = self._rows
            raise ValueError(
                f"Rows {start} to {stop} of {str(self.table.path)!r}, split {self.split!r}, hold "
                f"no window of {self.length} steps; choose a shorter one."
            )

    @property
    def _rows(self) -> tuple[int, int]:
        return (0, len(self.table)) if self.split is None else self.table.rows(self.split)

    def __len__(self) -> int:
        start, stop = self._rows
        return max(0, (stop - start - self.length) // self.step + 1)

    @functools.cached_property
    def _scaled(self) -> np.ndarray:
        return self.table.scaled_by(self.fitted_on or self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no window {index} of {len(self)}.")
        start = self._rows[0] + index * self.step
        rows = slice(start, start + self.length)
        example = {"series": self._scaled[rows]}
        if self.table.anomalies is not None:
            example["anomalies"] = self.table.anomalies[rows]
        return example


@dataclass(frozen=True)
class HideValues:
    """Imputation: `series` becomes `target`, and zero where `mask [time, variates]` is False.

    Attributes:
      rate: share of values to hide.
      seed: None: drawn anew each time, as training wants. A number: a function of it and of the
        window, so that evaluation hides the same values every time.
    """

    rate: float = 0.25
    seed: int | None = None

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Transform one example."""
        series = example["series"]
        if self.seed is not None:
            words = np.frombuffer(np.ascontiguousarray(series, "<f4").tobytes(), "<u4")
            rng = np.random.default_rng([self.seed, *words[:64].tolist()])
        mask = rng.random(series.shape) > self.rate
        return {**example, "series": np.where(mask, series, 0), "target": series, "mask": mask}
