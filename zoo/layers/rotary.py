"""Rotary positions (RoFormer, arXiv 2104.09864) and the ways to stretch them to longer texts.

Channel i of the first half of a head turns with channel i of the second half, by the angle
`position * frequency_i`, `frequency_i = theta ** (-2 i / head_dim)`. A scaling is a frozen
dataclass `(frequencies, rotary, positions) -> (frequencies, amplitude)`; it changes how fast
channels turn, and for some the size of cosine and sine. Definitions as in transformers.
"""

# ruff: noqa: D102 (the module's docstring says what a scaling's call does)

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of one model.

    Attributes:
      theta: base of the frequencies.
      scaling: one of the classes below, or None.
    """

    theta: float = 10000.0
    scaling: Callable | None = None

    def frequencies(
        self, head_dim: int, positions: Int[Array, "#batch length"]
    ) -> tuple[Float[Array, "half"], float]:
        """Radians a position of each pair of channels, and the factor on cosine and sine."""
        # In float32 as in transformers: at position 8,000 another rounding is a visible angle.
        powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1.0) / np.float32(self.theta) ** powers
        if self.scaling is None:
            return jnp.asarray(plain), 1.0
        return self.scaling(plain, self.theta, positions)

    def __call__(
        self, x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "#batch length"]
    ) -> Float[Array, "batch length heads head_dim"]:
        """Turn queries or keys that stand at `positions`."""
        frequencies, amplitude = self.frequencies(x.shape[-1], positions)
        angle = positions.astype(jnp.float32)[..., None, None] * frequencies
        sin, cos = amplitude * jnp.sin(angle), amplitude * jnp.cos(angle)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@dataclass(frozen=True)
class Linear:
    """Positions are divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def __call__(self, frequencies, theta, positions):
        return jnp.asarray(frequencies / np.float32(self.factor)), 1.0


@dataclass(frozen=True)
class Proportional:
    """The first `share` of the pairs of channels turn, `factor` times as slowly; others do not."""

    share: float = 1.0
    factor: float = 1.0

    def __call__(self, frequencies, theta, positions):
        turning = np.arange(len(frequencies)) < int(self.share * len(frequencies))
        return jnp.asarray(np.where(turning, frequencies / np.float32(self.factor), 0)), 1.0


@dataclass(frozen=True)
class Dynamic:
    """The base grows with the text once it is longer than `max_positions` (dynamic NTK).

    All frequencies depend on the last position of a call. Keys of earlier steps keep the angle that
    they got, so step by step is not the same function as the whole text, beyond `max_positions`.
    """

    factor: float
    max_positions: int

    def __call__(self, frequencies, theta, positions):
        head_dim = 2 * len(frequencies)
        length = jnp.maximum(positions.max() + 1, self.max_positions).astype(jnp.float32)
        growth = self.factor * length / self.max_positions - (self.factor - 1)
        base = theta * growth ** (head_dim / (head_dim - 2))
        powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return 1.0 / base**powers, 1.0


@dataclass(frozen=True)
class Llama3:
    """Slow channels are slowed by `factor`, fast ones are not, with a ramp between (LLaMA 3.1)."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __call__(self, frequencies, theta, positions):
        wavelength = np.float32(2 * math.pi) / frequencies
        slow = frequencies / np.float32(self.factor)
        smooth = (self.original / wavelength - self.low) / (self.high - self.low)
        ramp = (1 - smooth) * slow + smooth * frequencies
        out = np.where(wavelength > self.original / self.low, slow, frequencies)
        between = (wavelength <= self.original / self.low) & (
            wavelength >= self.original / self.high
        )
        return jnp.asarray(np.where(between, ramp, out), jnp.float32), 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): a ramp over channels, and larger queries and keys.

    Attributes:
      factor: how much longer texts become.
      original: positions of the original training.
      beta_fast: channels that turn more often than this over `original` are left alone.
      beta_slow: channels that turn less often are slowed by the whole factor.
      amplitude: of cosine and sine; None: `0.1 log(factor) + 1`.
      truncate: whether the ends of the ramp are whole channels.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    amplitude: float | None = None
    truncate: bool = True

    def __call__(self, frequencies, theta, positions):
        head_dim = 2 * len(frequencies)

        def channel(turns):
            periods = math.log(self.original / (turns * 2 * math.pi))
            return head_dim * periods / (2 * math.log(theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high + 0.001 if low == high else high
        ramp = np.clip((np.arange(len(frequencies), dtype=np.float32) - low) / (high - low), 0, 1)
        slowed = frequencies / np.float32(self.factor) * ramp + frequencies * (1 - ramp)
        amplitude = self.amplitude
        if amplitude is None:
            amplitude = 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0
        return jnp.asarray(slowed, jnp.float32), amplitude


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): a factor for each pair of channels, others for long texts.

    All frequencies depend on the last position of a call, as in `Dynamic`.

    Attributes:
      short: what frequencies are divided by in texts of up to `original` tokens.
      long: the same in longer ones.
      original: positions of the original training.
      factor: how much longer texts become.
      amplitude: of cosine and sine; None: `sqrt(1 + log(factor) / log(original))`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    amplitude: float | None = None

    def __call__(self, frequencies, theta, positions):
        short, long = (np.asarray(f, np.float32) for f in (self.short, self.long))
        if short.shape != frequencies.shape or long.shape != frequencies.shape:
            raise ValueError(
                f"LongRope has {len(short)} and {len(long)} factors for {len(frequencies)} pairs "
                "of channels; give one for each pair."
            )
        divisor = jnp.where(positions.max() + 1 > self.original, long, short)
        amplitude = self.amplitude
        if amplitude is None:
            grown = math.log(self.factor) / math.log(self.original) if self.factor > 1 else 0.0
            amplitude = math.sqrt(1 + grown)
        return frequencies / divisor, amplitude


def rotate_pairs(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "*#batch length"],
    theta: float = 10000.0,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary positions in their first form: channel 2i turns with channel 2i + 1."""
    angle = (
        positions.astype(jnp.float32)[..., None]
        * Rotary(theta).frequencies(x.shape[-1], positions)[0]
    )
    sin, cos = jnp.sin(angle)[..., None, :], jnp.cos(angle)[..., None, :]
    a, b = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    y = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return y.reshape(x.shape).astype(x.dtype)


def sines_and_cosines(length: int, channels: int) -> Float[Array, "length channels"]:
    """Fixed positions: the sines of all frequencies, then the cosines."""
    frequencies, _ = Rotary().frequencies(channels, jnp.zeros(1))
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[:, :channels]
