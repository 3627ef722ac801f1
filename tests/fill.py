"""Numbers from names: the weights and inputs behind every golden, so that none has to be stored.

Each number is a pure function of the tensor's name and the position in it, in 64-bit integers, and
so the same on every machine and in every library: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014),
whose state starts at crc32(name) times an odd constant.
"""

import math
import zlib

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment: 2^64 over the golden ratio
START = np.uint64(0xD1B54A32D192ED03)
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [-1, 1) of this shape: the top 24 bits of each mixed word, scaled."""
    with np.errstate(over="ignore"):
        word = STEP * np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        word += START * np.uint64(zlib.crc32(name.encode()))
        for shift, factor in MIX:
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
        word ^= word >> np.uint64(31)
    top = (word >> np.uint64(40)).astype(np.float64)
    return (top * 2.0**-23 - 1.0).astype(np.float32).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of a state dict called `name`, scaled so that deep networks keep unit activations.

    running_var: 1 + |u| / 2; running_mean: u / 10; vectors and scalars: 1 + u / 10 if their name
    ends in weight, scale or gamma, else u / 10; all others: u sqrt(3 / fan in).
    """
    u = uniform(name, shape)
    leaf = name.split(".")[-1]
    if leaf == "running_var":
        return 1.0 + 0.5 * np.abs(u)
    if leaf == "running_mean":
        return 0.1 * u
    if len(shape) > 1:
        return u * np.float32(np.sqrt(3.0 / max(math.prod(shape[1:]), 1)))
    return 1.0 + 0.1 * u if leaf in ("weight", "scale", "gamma") else 0.1 * u
