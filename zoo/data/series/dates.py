"""Dates of a table's rows: how they are read, and what of them is a feature."""

import datetime
from collections.abc import Callable

import numpy as np

DATE_FORMATS = ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d")
"""Tried after ISO 8601 where a table does not name its own."""


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
