"""Generations of TPUs and the slices there are of each."""

import re
from dataclasses import dataclass

from zoo.errors import ConfigError

GIB = 2**30


class NoPlan(ConfigError):
    """Nothing can be compiled; one sentence says why."""


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs, one device a chip.

    Attributes:
      hbm: GiB of memory on a chip.
      usable: GiB that the compiler may assign (its own figure).
      flops: peak in bfloat16, operations a second.
      bandwidth: of the memory, bytes a second.
      axes: of the torus.
      smallest: the slices there are, from one host on.
    """

    hbm: int
    usable: float
    flops: float
    bandwidth: float
    axes: int
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
CHIPS = {
    "v4": Chip(32, 30.75, 275e12, 1.23e12, 3, _CUBE),
    "v5e": Chip(16, 15.75, 197e12, 0.82e12, 2, _FLAT),
    "v5p": Chip(95, 95.73, 459e12, 2.77e12, 3, _CUBE),
    "v6e": Chip(32, 31.24, 918e12, 1.64e12, 2, _FLAT),
}
"""Peaks and bandwidths are Google's (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""


def find_chip(topology: str) -> Chip:
    """The chip of a topology's name.

    Raises:
      NoPlan: for an unknown generation, or a shape of the wrong kind.
    """
    name, colon, shape = topology.partition(":")
    if name not in CHIPS:
        raise NoPlan(f"There is no TPU {name!r}; choose {', '.join(CHIPS)}, as in v5e:16x16.")
    chip = CHIPS[name]
    if colon and not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.axes - 1), shape):
        raise NoPlan(
            f"{topology!r} is no {name} slice: it has {chip.axes} axes, as in "
            f"{name}:{chip.slices[4]}."
        )
    return chip
