"""Dates of a table's rows: how they are read, and what of them is a feature."""

import datetime
import re
from collections.abc import Callable

import numpy as np

DATE_FORMATS = ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d")
"""Tried after ISO 8601 where a table does not name its own."""

_OTHERS = tuple(
    day + time
    for day in (
        "%d.%m.%Y", "%d.%m.%y", "%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%d-%b-%Y",
        "%d %b %Y", "%b %d, %Y", "%Y.%m.%d", "%Y%m%d", "%Y-%m", "%Y/%m", "%m/%Y", "%Y", "%m/%d/%y",
        "%d/%m/%y", "%Y-%m-%d",
    )
    for time in ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", "%H%M", "%H%M%S")
)  # fmt: skip
"""Proposed where they are those of a table's dates: one must say which of several is meant."""


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


def parse_dates(
    texts: list[str], date_format: str | None = None, lines: np.ndarray | None = None
) -> np.ndarray:
    """Texts as `datetime64[s]`, or `[us]` where one has parts of a second; see `DATE_FORMATS`.

    Those with a time zone are taken to UTC.

    Args:
      texts: of dates.
      date_format: as `strptime` takes it, or `s` and `ms` for Unix time.
      lines: numbers of their lines, for messages; None: they begin in the second.

    Raises:
      ValueError: naming the first that is no date, and its line.
    """
    if date_format in ("s", "ms"):
        choices = [lambda t: _unix(float(t) / (1000 if date_format == "ms" else 1))]
    elif date_format is not None:
        choices = [lambda t: datetime.datetime.strptime(t, date_format)]
    else:
        choices = [lambda t, f=f: datetime.datetime.strptime(t, f) for f in DATE_FORMATS]
        choices.insert(0, datetime.datetime.fromisoformat)
    parse = next((c for c in choices if _parses(c, texts[0])), choices[0])  # all are written alike
    dates: list[datetime.datetime] = []
    zoned = 0
    for i, text in enumerate(texts):
        try:
            date = parse(text)
            if date.tzinfo is not None:
                zoned += 1
                date = date.astimezone(datetime.UTC).replace(tzinfo=None)
            dates.append(date)
        except (ValueError, OverflowError, OSError):
            hint = _form_of(texts)
            raise ValueError(
                f"Line {i + 2 if lines is None else lines[i]} has {text!r}, which is no date"
                f"{f' of the form {date_format!r}' if date_format else ''}; give date_format= "
                f"{hint}."
            ) from None
        if zoned not in (0, len(dates)):
            raise ValueError(
                f"Line {i + 2 if lines is None else lines[i]} has {text!r}; some dates have a time "
                "zone and some have none: give all of them one."
            )
    parted = any(date.microsecond for date in dates)
    return np.array(dates, "datetime64[us]" if parted else "datetime64[s]")


def _form_of(texts: list[str]) -> str:
    """What to give as the form of dates: what would read them, or an example."""
    if texts[0].isdecimal() and len(texts[0]) in (10, 13):
        return f"{'s' if len(texts[0]) == 10 else 'ms'!r} for Unix time"
    found = []
    for form in _OTHERS:
        try:
            # %d and its kin also read one digit, so that digits alone may be cut in several ways
            if all(_written(datetime.datetime.strptime(t, form), form, t) for t in texts):
                found.append(repr(form))
        except ValueError:
            continue
    if found:
        return f"{' or '.join(found)}"
    return "as strptime takes it, such as '%d.%m.%Y %H:%M'"


def _written(date: datetime.datetime, form: str, text: str) -> bool:
    """Whether a date of this form is written so, but for zeros in front and small letters."""
    plain = re.sub(r"\b0", "", date.strftime(form)).lower()
    return plain == re.sub(r"\b0", "", text).lower()


def _unix(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _parses(parse: Callable[[str], datetime.datetime], text: str) -> bool:
    try:
        parse(text)
    except (ValueError, OverflowError, OSError):
        return False
    return True
