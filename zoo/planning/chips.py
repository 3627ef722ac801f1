"""Generations of TPUs, the slices there are of each, and the names that people give them."""

import math
import re
from dataclasses import dataclass

from zoo.errors import ConfigError

GIB = 2**30


class NoPlan(ConfigError):
    """Nothing can be compiled; one sentence says why."""


class DoesNotDivide(NoPlan):
    """Mesh, batch and model do not divide on this slice; another one may do."""


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs, one device a chip.

    Attributes:
      hbm: GiB of memory on a chip.
      usable: GiB that the compiler may assign (its own figure).
      flops: peak in bfloat16, operations a second.
      bandwidth: of the memory, bytes a second.
      axes: of the torus.
      slices: the usual ones, from one host on.
      pod: chips of the largest slice.
      cores: TensorCores of a chip where cloud names count those (`v4-8` has four chips), else 1.
    """

    hbm: int
    usable: float
    flops: float
    bandwidth: float
    axes: int
    slices: tuple[str, ...]
    pod: int
    cores: int


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
CHIPS = {
    "v4": Chip(32, 30.75, 275e12, 1.23e12, 3, _CUBE, 4096, 2),
    "v5e": Chip(16, 15.75, 197e12, 0.82e12, 2, _FLAT, 256, 1),
    "v5p": Chip(95, 95.73, 459e12, 2.77e12, 3, _CUBE, 8960, 2),
    "v6e": Chip(32, 31.24, 918e12, 1.64e12, 2, _FLAT, 256, 1),
}
"""Peaks and bandwidths are Google's (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

_NAMES = {
    "v4": ("v4", "v4podslice"),
    "v5e": ("v5e", "v5lite", "v5litepod", "v5litepodslice", "v5litedevice"),
    "v5p": ("v5p", "v5pslice"),
    "v6e": ("v6e", "v6lite", "v6litepod", "v6eslice", "trillium"),
}
"""Names of the clouds without `tpu`, spaces and dashes: of accelerator types, of GKE, of JAX."""
_GENERATION = {name: chip for chip, names in _NAMES.items() for name in names}
_SLICE = re.compile(r"(.*?)(?:\s*[:=]\s*(?P<shape>.*)|[-_\s](?P<size>[0-9][0-9x]*))?")


def find_chip(topology: str) -> Chip:
    """The chip of a slice's or a generation's name.

    Raises:
      NoPlan: for an unknown generation, or a slice that there is not.
    """
    return CHIPS[find_slice(topology).partition(":")[0]]


def find_slice(name: str) -> str:
    """A slice or a generation as libtpu names it: `v5e:4x4` or `v5e`.

    `v5litepod-16`, `v5e-16`, `tpu-v5-lite-podslice:4x4` and `TPU v5e:4x4` are all `v5e:4x4`. The
    number is one of chips, for v4 and v5p one of TensorCores: `v4-8` is `v4:2x2x1`.

    Raises:
      NoPlan: for an unknown generation, or a slice that there is not.
    """
    asked = name.strip().lower().replace("×", "x").replace("*", "x")
    match = _SLICE.fullmatch(asked)
    if match is None:
        raise _unknown(name)
    letters = re.sub(r"[^a-z0-9]", "", match[1]).removeprefix("google").removeprefix("cloud")
    generation = _GENERATION.get(letters.removeprefix("tpu"))
    if generation is None:
        raise _unknown(name)
    if match["shape"] is None and match["size"] is None:
        return generation
    shape = match["shape"] if match["shape"] is not None else match["size"]
    if match["size"] and "x" not in match["size"]:
        return f"{generation}:{_shape_of(name, generation, int(match['size'][:9]))}"
    return f"{generation}:{_checked(name, generation, shape)}"


def _unknown(name: str) -> NoPlan:
    return NoPlan(
        f"{name!r} names no TPU that plans are made for; these are {', '.join(CHIPS)}, as in "
        "v5e:16x16, v5litepod-256 or v4-8."
    )


def _checked(name: str, generation: str, shape: str) -> str:
    """A shape as libtpu writes it, with as many axes as the generation has."""
    chip = CHIPS[generation]
    sides = r"x".join([r"([1-9][0-9]{0,5})"] * chip.axes)
    match = re.fullmatch(sides, shape)
    if match is None:
        raise NoPlan(
            f"{name!r} is no {generation} slice: its shape is {chip.axes} numbers of 1 or more, "
            f"as in {generation}:{chip.slices[4]}."
        )
    sizes = [int(size) for size in match.groups()]
    if math.prod(sizes) > chip.pod:
        raise NoPlan(
            f"{name!r} has {math.prod(sizes):,} chips, and the largest {generation} slice "
            f"{chip.pod:,}; --slices takes several of them."
        )
    return shape


def _shape_of(name: str, generation: str, count: int) -> str:
    """The shape that the cloud gives to a slice of so many chips, or TensorCores."""
    chip = CHIPS[generation]
    chips, rest = divmod(count, chip.cores)
    usual = {math.prod(map(int, shape.split("x"))): shape for shape in chip.slices}
    if not rest and chips in usual:
        return usual[chips]
    if not rest and chip.axes == 3 and chips % 64 == 0 and 0 < chips <= chip.pod:
        return "x".join(str(4 * side) for side in _cube(chips // 64))
    known = ", ".join(str(chips * chip.cores) for chips in usual)
    what = "chips" if chip.cores == 1 else f"TensorCores, {chip.cores} a chip"
    raise NoPlan(
        f"There is no slice {name!r}: the number is one of {what}, and {generation} slices have "
        f"{known}{'' if chip.axes == 2 else ' and more'}."
    )


def _cube(number: int) -> tuple[int, int, int]:
    """Three factors as near to one another as can be, in order."""
    return min(
        (
            (a, b, number // a // b)
            for a in range(1, math.isqrt(number) + 1)
            if number % a == 0
            for b in range(a, math.isqrt(number // a) + 1)
            if number // a % b == 0
        ),
        key=sum,
    )
