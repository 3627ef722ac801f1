"""A table of a series: rows of numbers in the order of time, their splits and their scale."""

import csv
import functools
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.data.series.dates import FREQUENCIES, parse_dates

SPLITS = ("train", "val", "test")


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
