"""Score functions: how a raw score becomes a weight, and how the gradient comes back.

Everything here is elementwise on plain values with no reference to grids or memory, so XLA and the
inside of every Pallas kernel run the same lines. The order is fixed:

    raw score = scale * q.k -> cap -> modify -> - slopes * |i - j| -> + bias -> mask -> weight

(tokamax adds the bias before it caps; where both are given, the results differ. A modifier that
adds the bias itself and then caps, with `cap=None` here, is their order.)

Masked scores are `MASKED`, a finite number: with -inf, the difference of two would be NaN. Whatever
stands behind a mask, NaN included, is replaced by it, never added to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

MASKED = -1e30
EMPTY = -5e29  # a row maximum or log-sum-exp below this means that the row sees no key


@dataclass(frozen=True)
class Softmax:
    """`w = exp(s - lse)`, the default.

    Attributes:
      cap: squashes raw scores to (-cap, cap) by `cap * tanh(s / cap)` (Gemma 2).
      modify: `f(score, q_index, k_index) -> score`, elementwise and differentiable in the score,
        written with jnp operators; -inf hides the key. It may close over arrays and traced values,
        which then receive gradients; such calls run in XLA.
    """

    cap: float | None = None
    modify: Callable | None = None

    normalised: ClassVar[bool] = True
    clipped: ClassVar[bool] = False

    def weight(self, s, lse):
        """The weight of each value; `s` is the finished score."""
        return jnp.exp(s - lse)

    def gradient(self, s, lse, dw, delta):
        """Gradient of the finished score, from that of the weight; `delta = sum(w * dw)`."""
        return jnp.exp(s - lse) * (dw - delta)


@dataclass(frozen=True)
class ClippedSoftmax:
    """`w = clip((zeta - gamma) * softmax(s) + gamma, 0, 1)` (Bondarenko et al. 2023).

    With gamma < 0 small probabilities become exact zeros, with zeta > 1 large ones exact ones.
    """

    gamma: float
    zeta: float = 1.0
    cap: float | None = None
    modify: Callable | None = None

    normalised: ClassVar[bool] = True
    clipped: ClassVar[bool] = True

    def weight(self, s, lse):
        """The weight of each value; masked scores get zero."""
        w = jnp.clip((self.zeta - self.gamma) * jnp.exp(s - lse) + self.gamma, 0.0, 1.0)
        return w if self.gamma <= 0 else jnp.where(s > EMPTY, w, 0.0)

    def unclipped(self, s, lse, dw):
        """`(p, g)`: the softmax, and the gradient of it; `delta = sum(p * g)` over keys."""
        p = jnp.exp(s - lse)
        stretched = (self.zeta - self.gamma) * p + self.gamma
        inside = (stretched > 0.0) & (stretched < 1.0) & (s > EMPTY)
        return p, jnp.where(inside, (self.zeta - self.gamma) * dw, 0.0)

    def gradient(self, s, lse, dw, delta):
        """Gradient of the finished score."""
        p, g = self.unclipped(s, lse, dw)
        return p * (g - delta)


@dataclass(frozen=True)
class Sigmoid:
    """`w = sigmoid(s + bias)` (Ramapuram et al. 2024, who take bias = -log(keys)). No row sums."""

    bias: float
    cap: float | None = None
    modify: Callable | None = None

    normalised: ClassVar[bool] = False
    clipped: ClassVar[bool] = False

    def weight(self, s, lse):
        """The weight of each value; `lse` is not used."""
        return jax.nn.sigmoid(s + self.bias)

    def gradient(self, s, lse, dw, delta):
        """Gradient of the finished score; `delta` is not used."""
        w = jax.nn.sigmoid(s + self.bias)
        return w * (1.0 - w) * dw


Score = Softmax | ClippedSoftmax | Sigmoid


def modified(score: Score, raw, q_index, k_index):
    """The raw score after the cap and the caller's function."""
    if score.cap is not None:
        raw = score.cap * jnp.tanh(raw / score.cap)
    if score.modify is not None:
        raw = score.modify(raw, q_index, k_index)
    return raw


def modified_with_slope(score: Score, raw, q_index, k_index):
    """`modified`, and its derivative by the raw score (None where that is one)."""
    if score.cap is None and score.modify is None:
        return raw, None
    return jax.jvp(lambda s: modified(score, s, q_index, k_index), (raw,), (jnp.ones_like(raw),))


def distance(q_index, k_index):
    """`|i - j|` in float32: what ALiBi multiplies by its slopes."""
    return jnp.abs(q_index - k_index).astype(jnp.float32)


def _scramble(x):
    """The finaliser of MurmurHash3: every input bit changes every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def dropout_factor(rate: float, seed, q_index, k_index, dtype=jnp.float32):
    """`1 / (1 - rate)` for kept probabilities and zero for dropped ones.

    A hash of (seed, query, key) decides, so that the backward pass, every implementation and every
    block size drop the same entries without storing anything. `seed` is uint32, one for each
    (batch, head).
    """
    row = _scramble(seed + _scramble(q_index.astype(jnp.uint32)))
    bits = _scramble(row + k_index.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))
    kept = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, jnp.asarray(1.0 / (1.0 - rate), dtype), jnp.asarray(0.0, dtype))
