"""Unified normalisation in place of a model's norms, and its form for inference.

The norm itself is `zoo.methods.unified_norm`. `UnifiedNorms` takes the place of layer norms and
root-mean-square norms; `FixedNorms.of` is its form for inference, without division or root, and
without any norm where a norm's only readers are linear maps.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from zoo.methods.method import (
    Method,
    Variables,
    intercepted,
    outermost,
    refuse_lost,
    unwrap,
)
from zoo.methods.unified_norm import Backward, Forward, UnifiedNorm, evaluate, init_state, normalise
from zoo.tasks.apply import zeros_like_inputs

STATISTICS = "statistics"
"""The optimizer group of the backward state, see `UnifiedNorms`."""

BACKWARD = ("un_backward_ema", "un_backward_window")
FORWARD = ("un_running", "un_window", "un_steps", "un_skips")

PRE_NORM = (("zoo.layers.block", "Block"), ("zoo.models.language.gpt2", "GPT2Block"))
"""Blocks (file, class) whose norms feed linear maps and nothing else: `FixedNorms` is folded."""


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
        block = type(reader.parent)
        if _norm_call(context, targets) and (block.__module__, block.__name__) in PRE_NORM:
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
