"""`zoo verify`: a system's checks on one variant."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from zoo.cli import output
from zoo.cli.arguments import RequestError, add_command, add_fields, overrides
from zoo.verify import verify


def add(commands: Any) -> None:
    """Add the command to the program."""
    sub = add_command(commands, "verify", run, "Check a model: counts, rules, gradients, goldens.")
    sub.add_argument("name", help="a name that zoo list shows")
    sub.add_argument("--weights", help="trained weights for reference cases that need them")
    add_fields(sub)


def run(options: argparse.Namespace) -> int:
    """Print each check as it is done; the status is 1 if one failed."""
    if options.weights is not None and not Path(options.weights).exists():
        raise RequestError(f"There are no weights {options.weights!r}.")
    words = {True: "ok", False: "FAILED", None: "skipped"}
    checks = []
    for check in verify(options.name, overrides(options.set), options.weights):
        checks.append(check)
        if not options.json:
            print(f"{words[check.passed]:8} {check.check:34} {check.detail}", flush=True)
    failed = [check.check for check in checks if check.passed is False]
    if options.json:
        output.print_json([dataclasses.asdict(check) for check in checks])
    elif failed:
        print(f"{options.name}: {len(failed)} of {len(checks)} checks failed")
    return 1 if failed else 0
