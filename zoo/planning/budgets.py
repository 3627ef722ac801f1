"""Budgets: the memory and the collectives that a config's plan may have, kept in a file."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from zoo.planning.plan import Plan

BUDGETS = Path("configs/budgets")
TOLERANCE = 0.05


def budget(found: Plan) -> dict[str, Any]:
    """What a budget file holds of a plan."""
    totals: dict[str, int] = defaultdict(int)
    for row in found.collectives:
        totals[f"{row.kind} of {row.what}"] += row.bytes
    return {
        "partition": found.partition,
        "hbm_bytes": found.hbm,
        "collective_bytes": dict(sorted(totals.items())),
        "compiler": found.compiler,
    }


def over_budget(found: Plan, allowed: dict[str, Any]) -> list[str]:
    """Sentences on what a plan exceeds a budget in; none if it keeps to it.

    HBM may grow by 5 %. Collectives of a kind may grow by 5 %, and no kind may be new, small ones
    (a thousandth of the whole) apart.
    """
    said = []
    if not found.fits:
        return [f"{found.config} no longer fits {found.topology}."]
    if found.hbm > (1 + TOLERANCE) * allowed["hbm_bytes"]:
        said.append(
            f"{found.config} on {found.topology} uses {found.hbm / 2**20:,.1f} MiB a chip; its "
            f"budget is {allowed['hbm_bytes'] / 2**20:,.1f} MiB and 5 %."
        )
    now, before = budget(found)["collective_bytes"], allowed["collective_bytes"]
    slack = sum(before.values()) / 1000
    for name, size in now.items():
        if size > (1 + TOLERANCE) * before.get(name, 0) + slack:
            rows = [row for row in found.collectives if f"{row.kind} of {row.what}" == name]
            said.append(
                f"{found.config} on {found.topology} runs {name} with {size / 2**20:,.1f} MiB a "
                f"step; its budget is {before.get(name, 0) / 2**20:,.1f} MiB. The largest is "
                f"{rows[0].shapes}, for {rows[0].source}."
            )
    return said


def write_budget(found: Plan, folder: Path = BUDGETS) -> Path:
    """Put a plan into the budget file of its config, beside those of other topologies."""
    path = folder / f"{found.config}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[found.topology] = budget(found)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
    return path
