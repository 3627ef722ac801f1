"""`zoo methods`: which methods work on which systems, and what they change."""

import argparse
import dataclasses
from typing import Any

from zoo.cli import output
from zoo.cli.arguments import RequestError, add_command


def add(commands: Any) -> None:
    """Add the command to the program."""
    sub = add_command(commands, "methods", run, "Methods and what they do to each system.")
    sub.add_argument("pattern", nargs="?", default="*", help="systems, e.g. 'vit*' (default: *)")
    sub.add_argument("--method", action="append", help="only this method; may be repeated")


def table(pattern: str, methods: list[str] | None) -> list[dict[str, Any]]:
    """One row a cell.

    Raises:
      RequestError: for a system or a method that there is not.
    """
    from zoo.methods import matrix

    columns = methods or list(matrix.COLUMNS)
    unknown = [name for name in columns if name not in matrix.COLUMNS]
    if unknown:
        raise RequestError(
            f"There is no method {unknown[0]!r}; there are {', '.join(matrix.COLUMNS)}."
        )
    names = matrix.systems(pattern)
    if not names:
        raise RequestError(f"No model matches {pattern!r}; zoo list shows all.")
    rows = []
    for name in names:
        traced = matrix.Traced.of(name)
        for column in columns:
            cell = matrix.cell(column, traced)
            rows.append({**dataclasses.asdict(cell), "effect": cell.effect})
    return rows


def run(options: argparse.Namespace) -> int:
    """Print the cells, one a line."""
    rows = table(options.pattern, options.method)
    if options.json:
        output.print_json(rows)
        return 0
    output.print_table(
        [
            {
                "system": row["system"].removesuffix("_test"),
                "method": row["method"],
                "applies": "yes" if row["works"] else "no",
                "effect": row["effect"],
            }
            for row in rows
        ]
    )
    return 0
