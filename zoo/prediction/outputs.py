"""Where rows of answers go: a table, JSON, CSV and JSON lines, each row as soon as it is there."""

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ConfigError

SUFFIXES = (".csv", ".json", ".jsonl", ".npz")


def write(rows: Iterable[Mapping[str, Any]], target: str | Path) -> int:
    """Write rows to a file by its ending (`SUFFIXES`); gives how many.

    CSV and JSON lines are written row by row, from the first that is known; JSON is one list, and
    .npz has an array a column.

    Raises:
      ConfigError: for another ending.
    """
    path = Path(target)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{str(path)!r} is no file to write to; end it in {', '.join(SUFFIXES)}.")
    rows = iter(rows)
    first = list(itertools.islice(rows, 1))  # what fails before it leaves an older file as it was
    rows = itertools.chain(first, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".npz":
        kept = list(rows)
        names = list(dict.fromkeys(name for row in kept for name in row))
        np.savez(path, **{name: np.array([row.get(name) for row in kept]) for name in names})
        return len(kept)
    with open(path, "w", newline="", encoding="utf-8") as file:
        if suffix == ".csv":
            return _csv(rows, file)
        if suffix == ".jsonl":
            return sum(1 for _ in _each(rows, lambda row: file.write(json.dumps(row) + "\n")))
        kept = list(rows)
        json.dump(kept, file, indent=1)
        return len(kept)


def _csv(rows: Iterable[Mapping[str, Any]], file: Any) -> int:
    writer, count = None, 0
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(file, list(row), extrasaction="ignore")
            writer.writeheader()
        writer.writerow({
            name: json.dumps(x) if isinstance(x, list | dict) else x for name, x in row.items()
        })  # fmt: skip
        file.flush()
        count += 1
    return count


def _each(rows: Iterable[Any], do: Any) -> Iterator[Any]:
    for row in rows:
        do(row)
        yield row


def show(rows: Iterable[Mapping[str, Any]], as_json: bool) -> int:
    """Print rows as they come: JSON lines, or cells parted by tabs under a header."""
    columns: list[str] | None = None
    count = 0
    for row in rows:
        count += 1
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if columns != list(row):
            columns = list(row)
            print("\t".join(columns))
        print("\t".join(map(_cell, row.values())), flush=True)
    sys.stdout.flush()
    return count


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        flat = np.asarray(value, dtype=object).ravel().tolist()
        more = f" ... ({len(flat)})" if len(flat) > 6 else ""
        return " ".join(map(_cell, flat[:6])) + more
    return str(value).replace("\t", " ").replace("\n", " ")
