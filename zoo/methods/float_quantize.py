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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.methods.linear import ALL_BUT_HEAD, dense_maps, is_target, kernel_of, observed, over_layers
from zoo.methods.method import Method, Variables, intercepted, unwrap

ROWS = 256
"""Tokens of a batch that biases are searched on."""


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

    def better(before: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], None]:
        best, least = before
        candidate = bias + step if offsets else bias * step
        got = error(form.quantise(values, candidate))
        return (jnp.where(got < least, candidate, best), jnp.minimum(got, least)), None

    start = (jnp.asarray(bias), error(form.quantise(values, bias)))
    return jax.lax.scan(better, start, jnp.asarray(steps, start[0].dtype))[0][0]


# -------------------------------------------------------------------------------- method


@jax.custom_jvp
def _straight_through(x: Array, rounded: Array) -> Array:
    return rounded


_straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


@dataclass(frozen=True)
class SmallFloat(Method):
    """Dense maps whose weights and inputs are numbers of a small format: FP4, FP6, FP8.

    Kernels hold the format's numbers in float32; `input_bias [in]` beside them is `rho + k`, the
    exponent bias of each channel of the input. Formats are those of the fields: the authors' search
    over formats is left out.

    Attributes:
      bits: of weights, with the sign.
      exponent: exponent bits of weights.
      input_bits: of inputs; None: they stay in float, and `merge` is exact.
      input_exponent: exponent bits of inputs.
      shifts: a whole number k per channel of the input; without, one range for the tensor.
      rounds: of the search for biases, weights first, then inputs; 0: from largest values alone.
      batches: of training data that is looked at.
      targets: dense maps (path, regex of the whole).
    """

    bits: int = 4
    exponent: int = 2
    input_bits: int | None = 4
    input_exponent: int = 2
    shifts: bool = True
    rounds: int = 0
    batches: int = 2
    targets: str = ALL_BUT_HEAD

    @property
    def calibration(self) -> int:
        """Batches that are looked at."""
        return 0 if self.input_bits is None and not self.rounds else self.batches

    @property
    def _of_inputs(self) -> Format | None:
        return None if self.input_bits is None else Format.of(self.input_bits, self.input_exponent)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that rounds the inputs of its dense maps."""
        return intercepted(module, self)

    def trains(self, path: str) -> bool:
        """Nothing is: weights are numbers of the format."""
        return False

    def adapt(
        self,
        module: nn.Module,
        variables: Variables,
        rng: PRNGKeyArray,
        batches: Sequence[Mapping[str, Array]] | None = None,
    ) -> dict[str, Any]:
        """The variables with weights on the grid, and the biases of inputs.

        Raises:
          ValueError: if no dense map matches `targets`, or there is no batch to calibrate on.
        """
        flat = flatten_dict(dict(variables))
        places = dense_maps(module, variables, self.targets)
        if not places:
            raise ValueError(
                f"SmallFloat's targets {self.targets!r} match no dense map of "
                f"{type(module).__name__}."
            )
        seen = {}
        if self.calibration and batches:
            seen = observed(module, variables, batches, self.targets, _rows, _more_rows)
        elif self.calibration and not isinstance(flat[places[0]], jax.core.Tracer):
            raise ValueError(
                "The range of inputs comes from data: give `adapt` batches, or use "
                "input_bits=None and rounds=0."
            )
        make = jax.jit(self._quantised)  # compiled once for maps of one shape
        for path in places:
            kernel = flat[path].astype(jnp.float32)
            rows = seen.get(path[1:-1], jnp.ones((*kernel.shape[:-2], 1, kernel.shape[-2])))
            quantised, bias = over_layers(make, 2, kernel, rows)
            flat[path] = quantised.astype(flat[path].dtype)
            if self.input_bits is not None:
                flat[(*path[:-1], "input_bias")] = bias
        return unflatten_dict(flat)

    def _quantised(
        self, kernel: Float[Array, "inputs outputs"], rows: Float[Array, "rows inputs"]
    ) -> tuple[Float[Array, "inputs outputs"], Float[Array, "inputs"]]:
        """The kernel in the format, and the bias of each channel of the input."""
        of_w, of_x, weight = Format.of(self.bits, self.exponent), self._of_inputs, kernel.T
        largest = jnp.maximum(jnp.abs(weight).max(-1, keepdims=True), 1e-12)
        w_bias, y = of_w.bias(largest), rows @ kernel
        x_bias, x_q = jnp.zeros(rows.shape[-1]), rows
        if of_x is not None:
            tops = jnp.maximum(jnp.abs(rows).max(0), 1e-12)
            tops = tops if self.shifts else jnp.full_like(tops, tops.max())
            _, rho, shift = channel_biases(of_x, tops)
            shift = shift if self.shifts else 0 * shift
            x_bias = rho + shift
        for _ in range(self.rounds):
            if of_x is not None:
                x_q = of_x.quantise(rows, x_bias)
            w_bias = search(of_w, weight, w_bias, partial(_row_errors, x_q, y))
            w_q = of_w.quantise(weight, w_bias)
            if of_x is not None:
                rho = _moved(of_x, rows, rho, shift, w_q, y)
                x_bias = rho + shift
        return of_w.quantise(weight, w_bias).T, x_bias

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The map of the rounded input."""
        dense = context.module
        known = is_target(context, self.targets) and kernel_of(dense) is not None
        if not known or not dense.has_variable("params", "input_bias"):
            return call(*args, **kwargs)
        x, *rest = args
        bias = dense.get_variable("params", "input_bias")
        rounded = self._of_inputs.quantise(x.astype(jnp.float32), bias).astype(x.dtype)
        return call(_straight_through(x, rounded), *rest, **kwargs)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """A plain model with the format's weights.

        Raises:
          ValueError: if inputs are rounded, too, which no plain model does.
        """
        plain = unwrap(module, self)
        if self.input_bits is not None:
            raise ValueError(
                "A plain model does not round its inputs: it cannot give the same outputs. Keep "
                "the wrapped model, or use SmallFloat(input_bits=None)."
            )
        return plain, dict(variables)


def _row_errors(x: Array, y: Array, weight: Array) -> Float[Array, "outputs 1"]:
    return jnp.square(x @ weight.T - y).mean(0)[:, None]


def _moved(
    form: Format, rows: Array, rho: Array, shift: Array, weight: Array, y: Array
) -> Float[Array, ""]:
    """The tensor's bias of the smallest error, with the channels' shifts as they are."""
    # A channel's grid with bias rho + k is 2^-k times that of rho: only rho is searched.
    scaled = rows * 2.0**shift
    error = lambda x: jnp.square((x * 2.0**-shift) @ weight.T - y).mean()  # noqa: E731
    return search(form, scaled, rho, error)


def _rows(x: Float[Array, "... inputs"]) -> Float[Array, "rows inputs"]:
    """`measure` for `observed`: some tokens, and the largest values of all."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.concatenate([jnp.abs(rows).max(0, keepdims=True), rows[:ROWS]])


def _more_rows(first: Array, second: Array) -> Array:
    return jnp.concatenate([first, second])
