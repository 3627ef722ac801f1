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

`UnifiedNorms` takes the place of a model's layer norms; `FixedNorms.of` is its form for inference,
without division or root, and without any norm where a norm's only reader is a linear map.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from zoo.methods.method import (
    Method,
    Variables,
    intercepted,
    outermost,
    refuse_lost,
    unwrap,
)
from zoo.tasks.apply import zeros_like_inputs

STATISTICS = "statistics"
"""The optimizer group of the backward state, see `UnifiedNorms`."""

BACKWARD = ("un_backward_ema", "un_backward_window")
FORWARD = ("un_running", "un_window", "un_steps", "un_skips")

PRE_NORM = ("Block", "ResidualBlock", "GPT2Block")
"""Blocks whose norms feed one map or three, and nothing else: `FixedNorms` is folded into them."""


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


# -------------------------------------------------------------------------------- methods


@jax.custom_vjp
def _towards(state: Backward) -> Backward:
    """The state, whose gradient is `state - next`: a step of SGD with rate 1 makes it the next."""
    return state


_towards.defvjp(
    lambda state: (state, state),
    lambda state, following: (jax.tree.map(jnp.subtract, state, following),),
)


def _norm_call(context: nn.module.InterceptorContext, targets: str) -> bool:
    norm = context.module
    called = isinstance(norm, nn.LayerNorm | nn.RMSNorm) and context.method_name == "__call__"
    return called and re.fullmatch(targets, "/".join(norm.path)) is not None


def _leaf(norm: nn.Module, name: str, default: float) -> Array | float:
    return norm.get_variable("params", name) if norm.has_variable("params", name) else default


@dataclass(frozen=True)
class UnifiedNorms(Method):
    """Unified normalisation in place of every layer norm and root-mean-square norm.

    A step of training leaves two states. The forward one stands in `batch_stats`. The backward one
    is two leaves beside each norm, in the optimizer group `STATISTICS`, whose gradient is the way
    to the next state: their optimizer is SGD with rate 1, which `optimizers` adds. The task's phase
    must train that group, too:

        class Task(Classification):
            phases = (Phase("train", ("train", STATISTICS)),)

    Attributes:
      norm: its settings.
      targets: norms (path, regex of the whole).
    """

    norm: UnifiedNorm = field(default_factory=UnifiedNorm)
    targets: str = ".*"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with these norms."""
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with both states.

        Raises:
          ValueError: if there is no such norm.
        """
        adapted = super().adapt(module, variables, rng, batches)
        if not any(path[-1] == FORWARD[0] for path in flatten_dict(adapted)):
            raise ValueError(f"{type(module).__name__} has no layer norm among {self.targets!r}.")
        return adapted

    def trains(self, path: str) -> str | None:
        """The backward states are, in a group of their own."""
        return STATISTICS if path.rpartition("/")[2] in BACKWARD else None

    @staticmethod
    def optimizers(optimizer: Any) -> dict[str, Any]:
        """Optimizers of a run: the one given, and that of the states."""
        from zoo.training.config import Optimizer

        state = Optimizer("sgd", learning_rate=1.0, schedule="constant", b1=0.0)
        return {"train": optimizer, STATISTICS: state}

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The norm of a step where `batch_stats` can change, else that of evaluation."""
        norm, x = context.module, args[0] if args else None
        if not _norm_call(context, self.targets):
            return call(*args, **kwargs)
        refuse_lost(norm, "batch_stats", FORWARD[0])
        if not norm.has_variable("batch_stats", FORWARD[0]):
            y = call(*args, **kwargs)
            self._states(norm, x.shape[-1])
            return y
        states, backward = self._states(norm, x.shape[-1])
        scale, bias = _leaf(norm, "scale", 1.0), _leaf(norm, "bias", 0.0)
        if not norm.is_mutable_collection("batch_stats"):
            return evaluate(self.norm, x, scale, bias, states[0].value).astype(x.dtype)
        ones = jnp.ones(x.shape[-1])
        y, following = normalise(
            self.norm,
            x,
            scale * ones,
            bias * ones,
            Forward(*(state.value for state in states)),
            _towards(backward),
        )
        for state, name in zip(states, ("running", "window", "steps", "skips"), strict=True):
            state.value = getattr(following, name)
        return y

    def _states(self, norm: nn.Module, channels: int) -> tuple[list[Any], Backward]:
        forward, backward = init_state(self.norm, channels)
        first = forward.running, forward.window, forward.steps, forward.skips
        states = [
            norm.variable("batch_stats", name, lambda value=value: value)
            for name, value in zip(FORWARD, first, strict=True)
        ]
        ema = norm.param(BACKWARD[0], lambda _: backward.ema)
        return states, Backward(ema, norm.param(BACKWARD[1], lambda _: backward.window))

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """There is no plain model with these norms.

        Raises:
          ValueError: always.
        """
        unwrap(module, self)
        raise ValueError(
            "A plain model's norms compute their statistics: use FixedNorms.of for inference."
        )


@dataclass(frozen=True)
class FixedNorms(Method):
    """Norms that are a factor and a summand per channel, or nothing.

    Attributes:
      targets: norms (path, regex of the whole).
    """

    targets: str = ".*"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with such norms."""
        return intercepted(module, self)

    def trains(self, path: str) -> bool:
        """Nothing is: it is for inference."""
        return False

    @classmethod
    def of(
        cls, method: UnifiedNorms, module: nn.Module, variables: Variables
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The form for inference of a module and variables that have `UnifiedNorms`.

        A norm whose only readers are linear maps with biases is folded into them and gone.
        """
        plain, fixed = unwrap(module, method), cls(method.targets)
        flat = flatten_dict(dict(variables))
        for path in [path for path in flat if path[-1] == FORWARD[0]]:
            place = ("params", *path[1:-1])
            running = flat[path]
            factor = 1 / jnp.sqrt(running + method.norm.epsilon)
            flat[(*place, "scale")] = flat.get((*place, "scale"), 1.0) * factor
        flat = {p: x for p, x in flat.items() if p[-1] not in (*BACKWARD, *FORWARD)}
        wrapped = fixed.wrap(plain)
        for norm, readers in _readers(wrapped, unflatten_dict(flat), method.targets).items():
            maps = [("params", *reader) for reader in readers]
            if not all((*place, "bias") in flat for place in maps):
                continue
            scale = flat.pop(("params", *norm, "scale"))
            bias = flat.pop(("params", *norm, "bias"), jnp.zeros_like(scale))
            for place in maps:
                kernel = flat[(*place, "kernel")]
                moved = jnp.einsum("...i,...io->...o", bias, kernel)
                flat[(*place, "bias")] = flat[(*place, "bias")] + moved
                flat[(*place, "kernel")] = scale[..., None] * kernel
        return wrapped, unflatten_dict(flat)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The norm's input times its factor, plus its summand."""
        norm = context.module
        if not _norm_call(context, self.targets) or norm.is_initializing():
            return call(*args, **kwargs)
        x, scale, bias = args[0], _leaf(norm, "scale", 1.0), _leaf(norm, "bias", 0.0)
        x = x if isinstance(scale, float) else x * scale.astype(x.dtype)
        return x if isinstance(bias, float) else x + bias.astype(x.dtype)


def _readers(
    module: nn.Module, variables: Variables, targets: str
) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Path of each norm of a pre-norm block -> paths of the dense maps that read it as it is."""
    outputs: list[tuple[Any, tuple[str, ...]]] = []
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        y = call(*args, **kwargs)
        reader = context.module
        if _norm_call(context, targets) and type(reader.parent).__name__ in PRE_NORM:
            outputs.append((y, tuple(reader.path)))
        if isinstance(reader, nn.Dense) and context.method_name == "__call__":
            for output, norm in outputs:
                if args[0] is output:
                    found.setdefault(norm, []).append(tuple(reader.path))
        return y

    def run(variables: Variables) -> Any:
        with outermost(listen):
            return module.apply(variables, **zeros_like_inputs(module))

    jax.eval_shape(run, dict(variables))
    return found
