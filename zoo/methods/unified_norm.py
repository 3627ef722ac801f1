"""Unified normalisation: LayerNorm's place taken by statistics that inference need not compute.

Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers", ACM MM 2022,
arXiv 2208.01313; official code github.com/hikvision-research/Unified-Normalization (Apache-2.0),
which we follow. Per channel, without a mean, in step `i` (counted from 1):

    x2 = mean over the tokens that are not padding of x^2;   window[i mod W] = x2
    outlier: some channel's arithmetic - geometric mean of the window > W Var(sqrt(window before));
             then window[i mod W] = running
    var = x2 in the first W steps, in warm-up and at an outlier, else the window's geometric mean
    z = x / sqrt(var + eps);   y = w z + b;   running <- m running + (1 - m) var
    r = sqrt(var + eps) / sqrt(running before + eps) in [1/5, 5]; 1 in the first steps, at outliers

and backwards, from the gradient G of y (the forward pass is not multiplied by r):

    g = G w r;   gz = mean over all tokens of g z;   window_g[i mod W'] = gz (ema at an outlier)
    mean = gz in the first W' steps, in warm-up and at an outlier, else the window's mean
    ema <- m ema + (1 - m) mean;    gx = (g - (mean at an outlier, else ema) z) / sqrt(var + eps)
    gw = sum G r z;    gb = sum G

So backwards has a state of its own. A gradient cannot write one: the new state comes out as the
"gradient" of the state that went in (`normalise`). In evaluation the norm is a number per channel,
`w x / sqrt(running + eps) + b`, which `fuse` moves into the linear map behind it.

Statistics are those of one device, as in the official code.

`zoo.methods.norms` puts it in place of a model's layer norms.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class UnifiedNorm:
    """The settings of the norm.

    Attributes:
      window: steps whose second moments are averaged; 1 counts every step as an outlier, as the
        official code does.
      gradient_window: steps whose gradient means are averaged; None: as many.
      warmup: steps before averages over the window are used.
      filtration: whether outliers are looked for (the authors: in vision yes, in language no).
      momentum: of both running averages.
    """

    window: int = 4
    gradient_window: int | None = None
    warmup: int = 4000
    filtration: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9

    @property
    def sizes(self) -> tuple[int, int]:
        """Of both windows."""
        return self.window, self.gradient_window or self.window


@struct.dataclass
class Forward:
    """What a step of the forward pass leaves: for the collection `batch_stats`."""

    running: Float[Array, "channels"]
    window: Float[Array, "window channels"]
    steps: Int[Array, ""]
    skips: Int[Array, ""]


@struct.dataclass
class Backward:
    """What a step of the backward pass leaves."""

    ema: Float[Array, "channels"]
    window: Float[Array, "window channels"]


def init_state(norm: UnifiedNorm, channels: int, steps: int = 0) -> tuple[Forward, Backward]:
    """Both states before the first step."""
    sizes, zeros = norm.sizes, partial(jnp.zeros, dtype=jnp.float32)
    count = partial(jnp.asarray, dtype=jnp.int32)
    forward = Forward(jnp.ones(channels), zeros((sizes[0], channels)), count(steps), count(0))
    return forward, Backward(zeros(channels), zeros((sizes[1], channels)))


def geometric_mean(window: Float[Array, "window channels"]) -> Float[Array, "channels"]:
    """By way of logarithms; zero where a row is zero."""
    return jnp.exp(jnp.log(window).mean(0))


@struct.dataclass
class _Step:
    """What the forward pass decides for this step."""

    var: Array
    ratio: Array
    outlier: Array
    steps: Array


def _advance(
    norm: UnifiedNorm,
    x: Float[Array, "... channels"],
    state: Forward,
    valid: Bool[Array, "..."] | None,
) -> tuple[_Step, Forward]:
    """Statistics of a step, and the next state."""
    size = norm.window
    steps = state.steps + 1
    squares = jnp.square(x.astype(jnp.float32))
    axes = tuple(range(x.ndim - 1))
    if valid is None:
        moment = squares.mean(axes)
    else:
        keep = valid[..., None].astype(jnp.float32)
        moment = (squares * keep).sum(axes) / keep.sum()
    spread = jnp.var(jnp.sqrt(state.window), ddof=1)
    window = state.window.at[steps % size].set(moment)
    outlier = jnp.asarray(size <= 1)
    skips = state.skips
    if norm.filtration:
        apart = window.mean(0) - geometric_mean(window)
        found = (steps >= norm.warmup) & jnp.any(apart > spread * size)
        window = jnp.where(found, window.at[steps % size].set(state.running), window)
        outlier, skips = outlier | found, skips + found
    early = (steps <= size) | (steps < norm.warmup) | outlier
    var = jnp.where(early, moment, geometric_mean(window))
    ratio = jnp.sqrt(var + norm.epsilon) / jnp.sqrt(state.running + norm.epsilon)
    plain = (steps <= max(1000, norm.warmup)) | outlier
    ratio = jnp.where(plain, 1.0, jnp.clip(ratio, 0.2, 5.0))
    running = norm.momentum * state.running + (1 - norm.momentum) * var
    return _Step(var, ratio, outlier, steps), Forward(running, window, steps, skips)


def normalise(
    norm: UnifiedNorm,
    x: Float[Array, "... channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    forward: Forward,
    backward: Backward,
    valid: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, "... channels"], Forward]:
    """A step in training.

    Args:
      norm: the settings.
      x: tokens.
      scale: w.
      bias: b.
      forward: state of the step before.
      backward: likewise; its "gradient" is the next one, which `jax.grad` with respect to it gives.
      valid: which tokens are none of padding; None: all.

    Returns:
      The normalised tokens, and the next forward state.
    """
    step, following = jax.lax.stop_gradient(_advance(norm, x, forward, valid))
    return _apply(norm, x, scale, bias, step, backward), following


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(
    norm: UnifiedNorm, x: Array, scale: Array, bias: Array, step: _Step, backward: Backward
) -> Array:
    z = x / jnp.sqrt(step.var + norm.epsilon)
    return (scale * z + bias).astype(x.dtype)


def _forward(
    norm: UnifiedNorm, x: Array, scale: Array, bias: Array, step: _Step, backward: Backward
) -> tuple[Array, tuple]:
    return _apply(norm, x, scale, bias, step, backward), (x, scale, bias, step, backward)


def _backward(norm: UnifiedNorm, kept: tuple, upstream: Array) -> tuple:
    x, scale, bias, step, state = kept
    root = jnp.sqrt(step.var + norm.epsilon)
    upstream32 = upstream.astype(jnp.float32)
    z = x.astype(jnp.float32) / root
    g = upstream32 * scale * step.ratio
    axes = tuple(range(x.ndim - 1))
    gz = (g * z).mean(axes)
    size = norm.sizes[1]
    row = jnp.where(step.outlier, state.ema, gz)
    window = state.window.at[step.steps % size].set(row)
    early = (step.steps <= size) | (step.steps < norm.warmup) | step.outlier
    mean = jnp.where(early, gz, window.mean(0))
    ema = norm.momentum * state.ema + (1 - norm.momentum) * mean
    gx = (g - jnp.where(step.outlier, mean, ema) * z) / root
    of_scale = (upstream32 * step.ratio * z).sum(axes).astype(scale.dtype)
    of_bias = upstream32.sum(axes).astype(bias.dtype)
    nothing = jax.tree.map(
        lambda leaf: (
            jnp.zeros_like(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        step,
    )
    return gx.astype(x.dtype), of_scale, of_bias, nothing, Backward(ema, window)


_apply.defvjp(_forward, _backward)


def evaluate(
    norm: UnifiedNorm,
    x: Float[Array, "... channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    running: Float[Array, "channels"],
) -> Float[Array, "... channels"]:
    """The norm in evaluation."""
    return scale * (x / jnp.sqrt(running + norm.epsilon)) + bias


def fuse(
    norm: UnifiedNorm,
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    running: Float[Array, "channels"],
    kernel: Float[Array, "channels outputs"],
    shift: Float[Array, "outputs"],
) -> tuple[Float[Array, "channels outputs"], Float[Array, "outputs"]]:
    """Kernel and bias of one linear map that does the norm's work, too: no division, no root."""
    factor = scale / jnp.sqrt(running + norm.epsilon)
    return factor[:, None] * kernel, shift + bias @ kernel
