"""Looks for what fits: the smallest slice of a generation, or the changes that a config needs."""

import math
from collections.abc import Sequence

from zoo.planning.chips import GIB, DoesNotDivide, NoPlan, find_chip, find_slice
from zoo.planning.plan import Plan, plan

STATE = (
    "parameters",
    "frozen parameters",
    "optimizer state",
    "mean of the parameters",
    "other state",
)
"""What a plan holds of the state, which fsdp cuts."""


def smallest(args: Sequence[str], chip: str, slices: int = 1) -> tuple[Plan, list[str]]:
    """The smallest slice of a chip's generation that a config fits, and what to change for it.

    Each slice is tried with all of `fsdp`; on the first that fits, with copies instead, as many as
    have room: they communicate less.

    Returns:
      the plan, and the partition as fields to add to the command line.

    Raises:
      NoPlan: if it fits none.
    """
    generation = find_slice(chip).partition(":")[0]
    failed: Plan | NoPlan = NoPlan(f"There is no slice of {chip}.")
    for shape in find_chip(chip).slices:
        chips = math.prod(map(int, shape.split("x"))) * slices
        topology = f"{generation}:{shape}"
        fields = _partition_fields(data=1, fsdp=chips)
        try:
            first = plan([*args, *fields], topology, slices)
        except DoesNotDivide as error:
            failed = error
            continue
        if not first.fits:
            failed = first
            continue
        for fsdp in (n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < chips):
            state = sum(first.holds[k] for k in first.holds if k in STATE) * chips / fsdp
            if state + first.holds["activations and temporaries"] > first.usable:
                continue
            wider = _partition_fields(data=-1, fsdp=fsdp)
            found = plan([*args, *wider], topology, slices)
            if found.fits:
                return found, wider
        return first, fields
    if isinstance(failed, NoPlan):
        raise failed
    raise NoPlan(
        f"It fits no slice up to {failed.topology}: a chip would need {failed.hbm / GIB:.2f} of "
        f"{failed.usable / GIB:.2f} GiB there; {proposal_text(args, failed)}."
    )


def _partition_fields(**sizes: int) -> list[str]:
    return [f"--partition.{axis}={size}" for axis, size in sizes.items()]


def proposal(args: Sequence[str], failed: Plan) -> tuple[list[str], Plan] | None:
    """Fields that make a config fit, with the plan that shows it; None if none was found.

    More fsdp, recomputation, microbatches and the optimizer's state in host memory are added in
    this order, none of which changes what is learnt.
    """
    whole = failed.chips // (
        failed.partition.get("tensor", 1) * failed.partition.get("sequence", 1)
    )
    steps = []
    if failed.partition["fsdp"] < whole:
        steps.append(_partition_fields(data=1, fsdp=whole))
    steps += [["--partition.remat=full"], ["--optimizer.accumulate=2"]]
    steps += [["--optimizer.accumulate=4"], ["--partition.offload=optimizer"]]
    fields: list[str] = []
    for step in steps:
        trial = [f for f in fields if f.split("=")[0] not in {s.split("=")[0] for s in step}] + step
        try:
            found = plan([*args, *trial], failed.topology, failed.slices)
        except NoPlan:
            continue
        if found.fits:
            return trial, found
        fields = trial
    return None


def proposal_text(args: Sequence[str], failed: Plan) -> str:
    """What makes a config fit, as the end of a sentence."""
    found = proposal(args, failed)
    if found is None:
        return "take more chips, or a smaller data.batch_size"
    fields, fitting = found
    return f"{' '.join(fields)} brings it to {fitting.hbm / GIB:.2f} GiB"
