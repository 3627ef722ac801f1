"""Small floating-point formats, and the post-training quantisation of LLM-FP4 with them.

Liu, Liu, Huang, Dong, Cheng, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", EMNLP 2023,
arXiv 2310.16836; official code github.com/nbasyl/LLM-FP4. A format has E exponent bits, M mantissa
bits and a sign, and a real-valued exponent bias b that takes a scale's place; all codes are
numbers:

    value = (-1)^s 2^(e - b) (1 + m / 2^M), e >= 1;    (-1)^s 2^(1 - b) m / 2^M, e = 0
    largest = (2 - 2^-M) 2^(2^E - 1 - b)
    b = 2^E - log2 A + log2(2 - 2^-M) - 1            where A is to be the largest value
    quantised: clip to the largest, p = max(1, floor(log2 |x| + b)), round to a multiple of
    2^(p - M - b), half to even

Weights have a bias per output, activations one per tensor (rho) and a whole number k per channel
("pre-shifted exponent bias"):

    b_c from each channel's largest value;   rho = min b_c
    k_c = clip(round b_c, round rho, round rho + 2^E - 1) - round rho

The values of channel c are 2^-k_c times those of the grid of rho, and `2^-k_c` is folded into the
weights exactly: `fold`. `search` moves biases for the smallest error of a layer's output.

The published code keeps M as an integer tensor, for which `2 ** -M` is 0: its grids have a level
more (`whole_powers=True` reproduces that).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    Attributes:
      exponent: its bits.
      mantissa: its bits.
      whole_powers: the published code's largest value, see above.
    """

    exponent: int = 2
    mantissa: int = 1
    whole_powers: bool = False

    @classmethod
    def of(cls, bits: int, exponent: int, **more: bool) -> "Format":
        """Of that many bits with the sign."""
        if not 0 < exponent < bits:
            raise ValueError(
                f"{exponent} exponent bits do not fit a number of {bits} bits, one of which is "
                f"its sign; give 1 to {bits - 1}."
            )
        return cls(exponent, bits - 1 - exponent, **more)

    @property
    def _top(self) -> float:
        return 2.0 if self.whole_powers else 2 - 2.0**-self.mantissa

    def bias(self, largest: Float[Array, "..."]) -> Float[Array, "..."]:
        """The exponent bias at which this is the largest number."""
        return 2**self.exponent - jnp.log2(largest) + np.log2(self._top) - 1

    def largest(self, bias: Float[Array, "..."]) -> Float[Array, "..."]:
        """The largest number."""
        return self._top * 2.0 ** (2**self.exponent - 1 - bias)

    def grid(self, bias: float) -> np.ndarray:
        """The numbers that are not negative, in order."""
        steps = np.arange(2**self.mantissa) / 2**self.mantissa
        low = 2.0 ** (1 - bias) * steps
        high = [2.0 ** (e - bias) * (1 + steps) for e in range(1, 2**self.exponent)]
        return np.concatenate([low, *high])

    def quantise(self, x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
        """The nearest numbers of the format; `bias` broadcasts."""
        largest = self.largest(bias)
        x = jnp.clip(x, -largest, largest)
        # The logarithm of zero and its gradient are left out: zero is on every grid.
        exponent = jnp.floor(jnp.log2(jnp.where(x == 0, 1.0, jnp.abs(x))) + bias)
        exponent = jnp.where(x == 0, 1.0, jnp.maximum(exponent, 1.0))
        step = jax.lax.stop_gradient(2.0 ** (exponent - self.mantissa - bias))
        return step * jnp.round(x / step)


def channel_biases(
    form: Format, largest: Float[Array, "channels"]
) -> tuple[Float[Array, "channels"], Float[Array, ""], Float[Array, "channels"]]:
    """The exponent biases of channels, from their largest values.

    Returns:
      Those that are wanted, the tensor's rho, and the whole numbers k that are added to it.
    """
    wanted = form.bias(largest)
    rho = wanted.min()
    low = jnp.round(rho)
    shift = jnp.clip(jnp.round(wanted), low, low + 2**form.exponent - 1) - low
    return wanted, rho, shift


def fold(
    weight: Float[Array, "outputs inputs"], shift: Float[Array, "inputs"]
) -> Float[Array, "outputs inputs"]:
    """Weights for activations that were multiplied by `2^shift` per channel: exact."""
    return weight * 2.0**-shift


def row_biases(form: Format, weight: Float[Array, "outputs inputs"]) -> Float[Array, "outputs 1"]:
    """The exponent bias of each output's weights."""
    return form.bias(jnp.abs(weight).max(-1, keepdims=True))


def search(
    form: Format,
    values: Float[Array, "..."],
    bias: Float[Array, "..."],
    error: Callable[[Array], Array],
    *,
    factors: tuple[float, float] = (0.01, 1.2),
    count: int = 100,
    offsets: bool = False,
) -> Float[Array, "..."]:
    """The candidates of a bias that give the smallest errors.

    Args:
      form: the format.
      values: what is quantised.
      bias: where the search starts; one of the candidates, so that it never gets worse.
      error: of the quantised values, shaped as `bias` where each has an error of its own.
      factors: the candidates are `bias` times numbers between these (as published), or
      offsets: ... plus numbers between -1 and 1: a factor moves nothing where the bias is near 0.
      count: of candidates.
    """
    low, high = (-1.0, 1.0) if offsets else factors
    steps = low + (high - low) * np.arange(count) / count
    candidates = [bias + step if offsets else bias * step for step in steps]
    best, least = bias, error(form.quantise(values, bias))
    for candidate in candidates:
        got = error(form.quantise(values, candidate))
        better = got < least
        best, least = jnp.where(better, candidate, best), jnp.where(better, got, least)
    return best
