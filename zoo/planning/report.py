"""A plan as text."""

from zoo.planning.chips import find_chip
from zoo.planning.plan import Plan


def readable(found: Plan, full: bool = False) -> str:
    """A plan as text."""
    chip = find_chip(found.topology)
    mesh = " ".join(f"{k}={v}" for k, v in found.partition.items() if v != 1) or "one device"
    many = f"{found.slices} slices of " if found.slices > 1 else ""
    lines = [f"{found.config} on {many}{found.topology}: {found.chips} chips, {mesh}", ""]
    lines.append("a chip holds                       MiB")
    for name, size in found.holds.items():
        lines.append(f"  {name:28}{size / 2**20:10,.1f}")
    share = 100 * found.hbm / found.usable
    verdict = "fits" if found.fits else "does NOT fit"
    lines.append(
        f"  {'in all':28}{found.hbm / 2**20:10,.1f}   of {found.usable / 2**20:,.0f} that can be "
        f"used of {chip.hbm} GiB: {share:.0f} %, {verdict}"
    )
    for name, size in found.host.items():
        lines.append(f"  {'in host memory: ' + name:28}{size / 2**20:10,.1f}")
    each = found.flops / found.chips
    lines += [
        "",
        f"a step computes {_units(found.flops)}FLOP, {_units(each)}FLOP a chip (matrix products "
        "and convolutions,",
        f"recomputed ones too): {1e3 * each / chip.flops:.1f} ms at the peak in bfloat16",
    ]
    if not found.fits:
        return "\n".join(lines)
    ridge = chip.flops / chip.bandwidth
    intensity = each / max(found.traffic, 1.0)
    bound = "arithmetic" if intensity > ridge else "memory"
    lines += [
        f"and moves {_units(found.traffic)}B to and from a chip's HBM: {intensity:.0f} FLOP a "
        f"byte, where {ridge:.0f} is the ridge: {bound} bound",
        "",
        "collectives a step, at a chip",
        f"  {'MiB':>10}  {'runs':>6}  {'chips':>5}  kind",
    ]
    rows = found.collectives if full else found.collectives[:12]
    for row in rows:
        once = "" if row.known else "  (an iteration of a loop of unknown length)"
        group = row.group or found.chips
        lines.append(
            f"  {row.bytes / 2**20:10,.2f}  {row.count:6}  {group:5}  {row.kind} of {row.what} "
            f"{row.shapes}{once}"
        )
        if full:
            lines.append(f"  {'':27}{row.source}")
    for rest, what in (
        (found.collectives[len(rows) :], "smaller ones (--full lists them)"),
        (found.collectives, "in all"),
    ):
        if rest:
            size, count = sum(row.bytes for row in rest), sum(row.count for row in rest)
            lines.append(f"  {size / 2**20:10,.2f}  {count:6}         {what}")
    lines += ["", f"planned in {found.seconds:.0f} s with {found.compiler}"]
    return "\n".join(lines)


def _units(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "
