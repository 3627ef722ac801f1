"""How the commands write: numbers, shapes, tables, JSON."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal


def quantity(value: float | None, unit: str = "") -> str:
    """A number in thousands (K), millions (M) or thousands of millions (G)."""
    if value is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.4g} {letter}{unit}"
    return f"{value:g}"


def one_line(value: Any) -> str:
    """A value as text in one line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {one_line(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(one_line(v) for v in value)
    return f"{value:,}" if type(value) is int else str(value)


def shape(sizes: Any) -> str:
    """A shape as `1x224x224x3`; outputs that are tuples of arrays, one after the other."""
    if sizes and all(isinstance(size, int) for size in sizes):
        return "x".join(map(str, sizes))
    return ", ".join(map(shape, sizes))


def print_table(rows: Sequence[Mapping[str, str]], numbers: Sequence[str] = ()) -> None:
    """Rows with the same keys, as a table on a terminal and as plain columns elsewhere.

    Columns named in `numbers` are set to the right; names of blanks are not shown.
    """
    columns = list(rows[0])
    headed = any(column.strip() for column in columns)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(header_style="bold", box=None, pad_edge=False, show_header=headed)
        for i, column in enumerate(columns):
            side: Literal["right", "left"] = "right" if column in numbers else "left"
            table.add_column(column, justify=side, no_wrap=i == 0, overflow="fold")
        for row in rows:
            table.add_row(*(_escaped(row[column]) for column in columns))
        Console().print(table)
        return
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    for row in (*([{c: c for c in columns}] * headed), *rows):
        cells = (
            row[c].rjust(widths[c]) if c in numbers else row[c].ljust(widths[c]) for c in columns
        )
        print("  ".join(cells).rstrip())


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))
