"""`zoo list`: the models that there are."""

import argparse
from typing import Any

from zoo import registry
from zoo.cli import output
from zoo.cli.arguments import RequestError, add_command
from zoo.shapes import input_shapes


def add(commands: Any) -> None:
    """Add the command to the program."""
    sub = add_command(commands, "list", run, "The models that there are.")
    sub.add_argument("pattern", nargs="?", default="*", help="wildcard, e.g. 'swin*' (default: *)")
    sub.add_argument("--task", help="only models for this, e.g. image_classification")


def list_variants(pattern: str, task: str | None) -> list[dict[str, Any]]:
    """One row a variant whose name matches.

    Raises:
      RequestError: if there is none.
    """
    found = registry.variants(pattern, task)
    if not found:
        of = f" of task {task!r}" if task else ""
        tasks = sorted({variant.task for variant in registry.variants().values()})
        raise RequestError(
            f"No model matches {pattern!r}{of}; zoo list shows all, and tasks are "
            f"{', '.join(tasks)}."
        )
    rows = []
    for name, variant in found.items():
        rows.append(
            {
                "name": name,
                "task": variant.task,
                "parameters": variant.params,
                "flops": variant.flops,
                "input": input_shapes(variant.create()),
                "source": variant.code,
                "licence": variant.licence,
            }
        )
    return rows


def run(options: argparse.Namespace) -> int:
    """Print the variants, one a line."""
    rows = list_variants(options.pattern, options.task)
    if options.json:
        output.print_json(rows)
        return 0
    output.print_table(
        [
            {
                "name": row["name"],
                "task": row["task"],
                "parameters": output.quantity(row["parameters"]),
                "FLOPs": output.quantity(row["flops"]),
                "input": output.shape(next(iter(row["input"].values()))[1:]),
                "source": row["source"],
                "licence": row["licence"],
            }
            for row in rows
        ],
        numbers=("parameters", "FLOPs"),
    )
    return 0
