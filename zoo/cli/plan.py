"""`zoo plan`: a config's train step, compiled for a TPU slice that need not be there."""

import argparse
import dataclasses
from typing import Any

from zoo.cli import output
from zoo.cli.arguments import RequestError, add_command


def add(commands: Any) -> None:
    """Add the command to the program."""
    text = "Compile a config's train step for a TPU slice, without one."
    sub = add_command(commands, "plan", run, text)
    sub.add_argument("config", help="a config file")
    sub.add_argument(
        "--topology",
        required=True,
        metavar="SLICE",
        help="chip and shape, as v5e:16x16, or a cloud's name, as v5litepod-256",
    )
    sub.add_argument("--slices", type=int, default=1, help="slices of that topology (default: 1)")
    sub.add_argument(
        "--partition", nargs="+", default=[], metavar="AXIS=SIZE", help="as fsdp=256 remat=full"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config, e.g. data.batch_size=1024; may be repeated",
    )
    sub.add_argument(
        "--smallest", action="store_true", help="find the smallest slice of the chip that it fits"
    )
    sub.add_argument("--full", action="store_true", help="list every collective, with its source")
    sub.add_argument(
        "--write-budget", action="store_true", help="keep the figures in configs/budgets"
    )


def run(options: argparse.Namespace) -> int:
    """Print a plan, or what would make it fit."""
    from zoo.planning import budgets, plan, report, search

    changes = [f"partition.{change}" for change in options.partition] + options.set
    args = [options.config, *(f"--{change}" for change in changes)]
    if options.smallest:
        found, fields = search.smallest(args, options.topology, options.slices)
    else:
        found, fields = plan.plan(args, options.topology, options.slices), []
    if options.write_budget:
        print(budgets.write_budget(found))
    if options.json:
        output.print_json(dataclasses.asdict(found))
    else:
        print(report.readable(found, options.full))
        if options.smallest:
            chips = f"{found.topology}, {found.chips} chips"
            print(f"The smallest that it fits: {chips}, with {' '.join(fields)}")
    if found.fits:
        return 0
    needed = f"{found.hbm / 2**30:.2f} of {found.usable / 2**30:.2f} GiB"
    better = search.proposal_text(args, found)
    raise RequestError(f"A chip of {found.topology} would need {needed}: {better}.")
