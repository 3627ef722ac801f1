"""A table of a series: rows of numbers in the order of time, their splits and their scale.

    table = Table("load.csv", date="time")
    windows = functools.partial(Windows, table, context_length=96, horizon=24)
    data = Data(windows("train"), windows("val"), test=windows("test"), batch_size=32)

`zoo predict RUN load.csv` then gives the 24 hours after the last row, in the units of the file.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from zoo.data.series.csv_file import CsvFile
from zoo.data.series.dates import FREQUENCIES, parse_dates
from zoo.kinds import check_kinds

SPLITS = ("train", "val", "test")
MONDAY = np.datetime64("1970-01-05")  # from which business days are counted


@dataclass(frozen=True)
class Table:
    """Rows of numbers in the order of time, from a CSV file (also inside a .zip, or a .gz).

    A step is a row, so that rows must follow each other evenly. Rows out of order, several rows of
    one date and missing dates are refused, with their line, until a field says what to do.

    Attributes:
      path: the file.
      date: the column of dates.
      columns: which others to read, in this order; None: all. The univariate case is one.
      target: the column to put last, as Time-Series-Library does; None: the order stays.
      labels: a column that is 1 where a row is anomalous and 0 elsewhere; it is no variate.
      delimiter: between cells; None: as the header shows.
      date_format: as `strptime` takes it, or `s` and `ms` for Unix time; None: ISO 8601, or
        year/month/day. Dates with a time zone are taken to UTC.
      fill_gaps: put the value before into empty cells (at the beginning the first that comes),
        which are refused otherwise.
      splits: rows for training, validation and test; or shares that sum to 1, rounded as
        Time-Series-Library rounds them. Rows past the last split are not used.
      frequency: of the time features, a key of `FREQUENCIES`.
      decimal: mark of fractions; None: as the cells show.
      encoding: of the file; None: as its bytes show.
      order: of rows that are not in the order of time: `refuse`, `sort`, or `keep` as they are.
      repeats: several rows of one date: `refuse`, take the `first`, the `last`, their `mean`, or
        `keep` each as a step.
      gaps: dates that are missing: `refuse`, `fill` rows in between, on a straight line, or `keep`
        the rows as steps.
      series: a column that names one of several series in the file: each becomes variates of its
        own, `value name`, side by side. Dates that one of them lacks are empty cells.
      only: names of the series to read; None: all.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not what the fields say, with the line.
    """

    path: str | Path
    date: str = "date"
    columns: tuple[str, ...] | None = None
    target: str | None = None
    labels: str | None = None
    delimiter: str | None = None
    date_format: str | None = None
    fill_gaps: bool = False
    splits: tuple[float, float, float] = (0.7, 0.1, 0.2)
    frequency: str = "h"
    decimal: Literal[".", ","] | None = None
    encoding: str | None = None
    order: Literal["refuse", "sort", "keep"] = "refuse"
    repeats: Literal["refuse", "first", "last", "mean", "keep"] = "refuse"
    gaps: Literal["refuse", "fill", "keep"] = "refuse"
    series: str | None = None
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.columns, str):
            object.__setattr__(self, "columns", (self.columns,))
        check_kinds(self)
        if len(set(self.columns or ())) < len(self.columns or ()):
            raise ValueError(f"columns={self.columns} names a column twice.")
        whole = all(isinstance(size, int) for size in self.splits)
        if not all(size >= 0 for size in self.splits) or not sum(self.splits) > 0:
            raise ValueError(f"splits={self.splits} are rows or shares; give none below 0.")
        if not whole and abs(sum(self.splits) - 1) > 1e-9:
            raise ValueError(f"splits={self.splits} are shares, which must sum to 1.")
        if self.frequency not in FREQUENCIES:
            raise ValueError(
                f"frequency={self.frequency!r} is none of {', '.join(FREQUENCIES)} (minutes, "
                "hours, days, business days, weeks, months)."
            )

    @functools.cached_property
    def _contents(
        self,
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """Names, dates, values, labels, and which values were not in the file."""
        file = CsvFile(self.path, self.delimiter, self.decimal, self.encoding)
        chosen = self._chosen(file)
        wanted = [*chosen, *([self.labels] if self.labels else [])]
        dates, values, lines, names = self._read(file, wanted)
        if self.series is not None:
            dates, values, lines, chosen = self._side_by_side(dates, values, lines, names, chosen)
            wanted = list(chosen)
        else:
            dates, values, lines = self._in_time(dates, values, lines)
        before, holes = dates, ~np.isfinite(values)
        values = self._filled(values, lines, wanted)
        dates, values = self._even(dates, values, lines)
        if len(dates) > len(before):
            own, holes = holes, np.ones(values.shape, bool)
            holes[np.searchsorted(dates, before)] = own
        labels = values[:, -1] != 0 if self.labels else None
        if labels is not None and (odd := np.flatnonzero(values[:, -1] != labels)).size:
            raise ValueError(
                f"{len(odd)} rows of {str(self.path)!r} have a label {self.labels!r} that is "
                f"neither 0 nor 1, such as {values[odd[0], -1]:g}; write 1 for an anomalous row."
            )
        count = len(chosen)
        return tuple(chosen), dates, values[:, :count], labels, holes[:, :count]

    def _chosen(self, file: CsvFile) -> tuple[str, ...]:
        """The columns that are variates."""
        header, path = file.header, str(self.path)
        named = [self.date, *(n for n in (self.labels, self.series, self.target) if n)]
        for name in [*named, *(self.columns or ())]:
            if name not in header:
                close = [h for h in header if h.lower() in (
                    name.lower(), "date", "time", "timestamp", "datetime", "ds")]  # fmt: skip
                close = close or (self._dated(file) if name == self.date else [])
                hint = f"; give date={close[0]!r}" if name == self.date and close else ""
                if any(_parses(text, self.date_format) for text in header):
                    hint = "; these seem to be a row: put a line with the columns' names above"
                elif name == self.date and not close:
                    hint = "; a table needs a column of dates (date= is its name)"
                raise ValueError(
                    f"{path!r} has no column {name!r}; its columns are "
                    f"{', '.join(header[:20])}{hint}."
                )
            if header.count(name) > 1:
                raise ValueError(f"{path!r} has {header.count(name)} columns {name!r}; rename one.")
        if self.columns:
            chosen = tuple(self.columns)
        else:
            first = next(file.pieces(), [])
            rest = [
                i for i, n in enumerate(header) if n not in (self.date, self.labels, self.series)
            ]
            rest = [i for i in rest if header[i] or not _is_index([row[i] for _, row in first])]
            unnamed = [i + 1 for i in rest if not header[i]]
            if unnamed:
                raise ValueError(
                    f"Column {unnamed[0]} of {path!r} has no name; name the columns to read with "
                    "columns=."
                )
            chosen = tuple(header[i] for i in rest)
            for name in chosen:
                if header.count(name) > 1:
                    raise ValueError(
                        f"{path!r} has {header.count(name)} columns {name!r}; rename one, or name "
                        "the columns to read with columns=."
                    )
        if not chosen and self.target is None:
            raise ValueError(f"{path!r} has no column of numbers beside {self.date!r}.")
        if self.target is not None:
            chosen = (*(c for c in chosen if c != self.target), self.target)
        return chosen

    def _dated(self, file: CsvFile) -> list[str]:
        """Columns that begin with a date."""
        _, row = next(file.pieces(), [(0, [])])[0]
        return [
            name
            for name, cell in zip(file.header, row, strict=False)
            if _parses(cell.strip(), self.date_format)
        ]

    def _read(
        self, file: CsvFile, wanted: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Dates, values, line numbers and names of series, as they stand in the file."""
        when, *places = (file.header.index(name) for name in (self.date, *wanted))
        kind = file.header.index(self.series) if self.series is not None else None
        dates, values, lines, names = [], [], [], []
        for piece in file.pieces():
            if kind is not None and self.only is not None:
                piece = [(n, row) for n, row in piece if row[kind].strip() in self.only]
                if not piece:
                    continue
            numbers = []
            for number, row in piece:
                try:
                    numbers.append([file.number(row[i]) for i in places])
                except ValueError as error:
                    hint = (
                        "name the numeric columns with columns=, or the column that names one of "
                        "several series with series="
                    )
                    if re.fullmatch(r"'\W*[\d.,'\s]+\W*'", str(error)):
                        hint = "write numbers without marks of thousands, units and percent signs"
                    raise ValueError(
                        f"Line {number} of {str(self.path)!r} is no row of numbers ({error}); "
                        f"{hint}."
                    ) from None
            values.append(np.array(numbers, float).reshape(len(piece), len(places)))
            lines.append(np.array([number for number, _ in piece]))
            texts = [row[when].strip() for _, row in piece]
            dates.append(parse_dates(texts, self.date_format, lines[-1]))
            if kind is not None:
                names.append(np.array([row[kind].strip() for _, row in piece]))
        if not lines:
            of = f" of the series {', '.join(self.only)}" if self.only else ""
            raise ValueError(f"{str(self.path)!r} has a header and no rows{of}.")
        joined = (np.concatenate(parts) for parts in (dates, values, lines))
        return *joined, np.concatenate(names) if names else None

    def _in_time(
        self, dates: np.ndarray, values: np.ndarray, lines: np.ndarray, of: str = ""
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows in the order of time, one a date."""
        back = np.flatnonzero(np.diff(dates) < np.timedelta64(0))
        if len(back) and self.order != "keep":
            if self.order == "refuse":
                raise ValueError(
                    f"Line {lines[back[0] + 1]} of {str(self.path)!r}{of} is earlier than the row "
                    f"before it ({len(back)} rows are so); order='sort' sorts them. If the file "
                    "holds several series one below the other, series= names their column."
                )
            order = np.argsort(dates, kind="stable")
            dates, values, lines = dates[order], values[order], lines[order]
        same = np.flatnonzero(np.diff(dates) == np.timedelta64(0))
        if not len(same) or self.repeats == "keep":
            return dates, values, lines
        if self.repeats == "refuse":
            raise ValueError(
                f"Line {lines[same[0] + 1]} of {str(self.path)!r}{of} has the date of another row, "
                f"{dates[same[0]]} ({len(same)} rows are so); repeats= takes the 'first', the "
                "'last' or the 'mean'. If the file holds several series, series= names their "
                "column."
            )
        unique, first, count = np.unique(dates, return_index=True, return_counts=True)
        if self.repeats == "mean":
            sums = np.add.reduceat(values, first, axis=0)
            return unique, sums / count[:, None], lines[first]
        place = first if self.repeats == "first" else first + count - 1
        return unique, values[place], lines[place]

    def _side_by_side(
        self,
        dates: np.ndarray,
        values: np.ndarray,
        lines: np.ndarray,
        names: np.ndarray,
        columns: Sequence[str],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
        """Several series, one below the other, as columns beside each other."""
        if self.labels:
            raise ValueError("labels= and series= do not go together; read one series with only=.")
        every, found = np.unique(dates), list(dict.fromkeys(names.tolist()))
        wide = np.full((len(every), len(found) * len(columns)), np.nan)
        where = np.zeros(len(every), int)
        for i, name in enumerate(found):
            own = names == name
            when, numbers, at = self._in_time(
                dates[own], values[own], lines[own], f" (series {name!r})"
            )
            rows = np.searchsorted(every, when)
            wide[rows, i * len(columns) : (i + 1) * len(columns)] = numbers
            where[rows] = at
        chosen = tuple(f"{column} {name}" for name in found for column in columns)
        return every, wide, where, chosen

    def _filled(self, values: np.ndarray, lines: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Values without holes."""
        holes = ~np.isfinite(values)
        if not holes.any():
            return values
        empty = [name for name, column in zip(names, holes.T, strict=True) if column.all()]
        if empty:
            raise ValueError(
                f"The column {empty[0]!r} of {str(self.path)!r} has no number at all; name the "
                "columns to read with columns=."
            )
        if not self.fill_gaps:
            row, column = np.argwhere(holes)[0]
            raise ValueError(
                f"Line {lines[row]} of {str(self.path)!r} has no number for {names[column]!r} "
                f"({holes.sum()} cells are so); fill_gaps=True takes the value before."
            )
        places = np.where(holes, 0, np.arange(len(values))[:, None])
        places = np.maximum.accumulate(places, axis=0)
        first = np.argmin(holes, axis=0)  # of each column, the first row with a number
        places = np.maximum(places, first)
        return np.take_along_axis(values, places, axis=0)

    def _even(
        self, dates: np.ndarray, values: np.ndarray, lines: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows at even steps."""
        if self.gaps == "keep" or len(dates) < 3:
            return dates, values
        ticks, unit = _ticks(dates, self.frequency)
        steps = np.diff(ticks)
        step = int(np.median(steps))
        odd = np.flatnonzero(steps != step)
        if not len(odd) or step <= 0:
            return dates, values
        where = f"after line {lines[odd[0]]} ({dates[odd[0]]}) of {str(self.path)!r}"
        if self.gaps == "refuse" or (steps % step).any():
            missing = int((steps[odd] // step - 1).clip(0).sum())
            if (steps % step).any():
                hint = "the rows do not follow each other evenly; gaps='keep' takes each as a step"
            else:
                hint = (
                    "gaps='fill' puts rows in between, on a straight line, and gaps='keep' takes "
                    "the rows as steps"
                )
            raise ValueError(
                f"{len(odd)} of {len(steps)} steps are not {step} {unit}, the first {where}, and "
                f"{missing} rows are missing; {hint}."
            )
        whole = np.arange(ticks[0], ticks[-1] + 1, step)
        filled = np.stack([np.interp(whole, ticks, column) for column in values.T], 1)
        if self.labels:
            filled[:, -1] = np.round(filled[:, -1])
        return _dates(whole, unit, dates[0]), filled

    def following(self, count: int) -> np.ndarray:
        """The dates of so many steps after the last row, `datetime64[s] [count]`."""
        ticks, unit = _ticks(self.dates, self.frequency)
        step = max(int(np.median(np.diff(ticks))), 1) if len(ticks) > 1 else 1
        return _dates(ticks[-1] + step * np.arange(1, count + 1), unit, self.dates[-1])

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

    @property
    def holes(self) -> np.ndarray:
        """`bool [rows, variates]`: values that were not in the file and were filled in."""
        return self._contents[4]

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
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((self.values - mean) / deviation).astype(np.float32)
        if not (good := np.isfinite(scaled).all(axis=0)).all():
            name = self.variates[int(np.argmin(good))]
            raise ValueError(
                f"The column {name!r} of {str(self.path)!r} has values too large to be scaled, up "
                f"to {np.abs(self.values[:, np.argmin(good)]).max():g}; mend or leave it out."
            )
        return scaled

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
            train, _, test = self.splits
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


def _parses(text: str, date_format: str | None) -> bool:
    """Whether a cell is a date and no mere number."""
    try:
        parse_dates([text], date_format)
    except ValueError as error:
        return "give date_format= '%" in str(error) and not text.isdecimal()
    return not text.isdecimal()


def _ticks(dates: np.ndarray, frequency: str) -> tuple[np.ndarray, str]:
    """Dates as whole numbers that rise evenly where nothing is missing, and their unit."""
    if frequency == "m" or (len(dates) > 2 and _monthly(dates)):
        return dates.astype("datetime64[M]").astype(np.int64), "months"
    if frequency == "b":
        days = dates.astype("datetime64[D]")
        return np.busday_count(MONDAY, days), "business days"
    if dates.dtype == np.dtype("datetime64[us]"):
        return dates.astype(np.int64), "microseconds"
    return dates.astype("datetime64[s]").astype(np.int64), "seconds"


def _monthly(dates: np.ndarray) -> bool:
    """Whether dates are whole months apart, at one day of the month or at its end."""
    days = np.diff(dates.astype("datetime64[D]")).astype(int)
    place = dates.astype("datetime64[D]") - dates.astype("datetime64[M]")
    return bool((days >= 28).all() and (days % 7 != 0).any() and np.ptp(place.astype(int)) <= 3)


def _dates(ticks: np.ndarray, unit: str, like: np.datetime64) -> np.ndarray:
    """The inverse of `_ticks`."""
    if unit == "months":
        within = like - like.astype("datetime64[M]").astype("datetime64[s]")
        starts = ticks.astype("datetime64[M]")
        ends = (starts + 1).astype("datetime64[s]") - np.timedelta64(1, "D")
        return np.minimum(
            starts.astype("datetime64[s]") + within, ends + within % np.timedelta64(1, "D")
        )
    if unit == "business days":
        return np.busday_offset(MONDAY, ticks).astype("datetime64[s]")
    return ticks.astype("datetime64[us]" if unit == "microseconds" else "datetime64[s]")


def _is_index(cells: Sequence[str]) -> bool:
    """Whether a column without a name numbers the rows, as pandas writes it, or is empty."""
    if all(not cell.strip() for cell in cells):
        return True
    try:
        numbers = [int(cell) for cell in cells]
    except ValueError:
        return False
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
