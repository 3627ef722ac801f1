"""`zoo objectives`: what models learn from, and which systems do."""

import argparse
from typing import Any

from zoo.cli import output
from zoo.cli.arguments import add_command


def add(commands: Any) -> None:
    """Add the command to the program."""
    add_command(commands, "objectives", run, "What models learn from, and which systems do.")


def run(options: argparse.Namespace) -> int:
    """Print the table, one objective and modality a line."""
    from zoo.tasks.coverage import table

    rows = table()
    if options.json:
        output.print_json(rows)
        return 0
    columns = ("objective", "what", "modality", "systems", "made_of")
    output.print_table([{c: output.one_line(row[c]) for c in columns} for row in rows])
    return 0
