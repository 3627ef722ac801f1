"""Update rules of optax by name, their schedules, and which leaves decay."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from zoo.errors import ConfigError
from zoo.training.config import Optimizer
from zoo.training.tree import path_of

NO_DECAY = (
    r".*position.*",  # position embeddings, relative position bias tables
    r".*(^|/)(cls|dist|class|mask)?_?tokens?",
    r".*(^|/)norm[^/]*/.*",
    r".*(^|/)random_features",  # frozen
)
"""Paths of leaves of more than one axis that do not decay, besides all biases, scales and norms."""


def make_schedule(config: Optimizer, num_steps: int) -> Callable[[Any], Any]:
    """Learning rate as a function of the step.

    Raises:
      ConfigError: if the warmup is longer than the run.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    start, end = peak * config.initial_fraction, peak * config.final_fraction
    if config.schedule == "one_cycle":
        rise = max(1, round(0.3 * num_steps))
        fall = max(1, num_steps - rise)
        return optax.join_schedules([_cosine(start, peak, rise), _cosine(peak, end, fall)], [rise])
    if warmup and warmup >= num_steps:
        raise ConfigError(
            f"optimizer.warmup_steps is {warmup}, but the run has {num_steps} steps; "
            "give fewer warmup steps or more steps."
        )
    rest = num_steps - warmup
    body = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, rest),
        "cosine": _cosine(peak, end, rest),
    }[config.schedule]
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(start, peak, warmup), body], [warmup])


def _cosine(start: float, end: float, steps: int) -> Callable[[Any], Any]:
    """Half a cosine from `start` to `end`."""

    def schedule(step: Any) -> Any:
        part = jax.numpy.clip(step / steps, 0.0, 1.0)
        return end + (start - end) * 0.5 * (1 + jax.numpy.cos(jax.numpy.pi * part))

    return schedule


def decays(params: Any, no_decay: tuple[str, ...] = ()) -> Any:
    """A tree of booleans: whether a leaf has weight decay.

    Matrices and filters do. Biases, scales and all else of one axis, norms, tables of positions,
    class tokens, and what `no_decay` matches (whole path, regex) do not. Layers stacked by scan
    count as one leaf each.
    """
    patterns = [re.compile(p) for p in (*NO_DECAY, *no_decay)]

    def decides(keys: tuple, leaf: Any) -> bool:
        path = path_of(keys)
        axes = len(leaf.shape) - bool(re.search(r"(^|/)layers/", path))
        return axes > 1 and not any(p.fullmatch(path) for p in patterns)

    return jax.tree_util.tree_map_with_path(decides, params)


def make_optimizer(config: Optimizer, num_steps: int) -> optax.GradientTransformation:
    """Clipping, the rule, decoupled weight decay and the schedule, in this order.

    Raises:
      ConfigError: if the warmup is longer than the run.
    """
    b1, b2, eps = config.b1, config.b2, config.eps
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
        "adam": lambda: optax.scale_by_adam(b1, b2, eps),
        "nadamw": lambda: optax.scale_by_adam(b1, b2, eps, nesterov=True),
        "lamb": lambda: optax.scale_by_adam(b1, b2, eps),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        "sgd": lambda: optax.trace(b1, nesterov=config.nesterov) if b1 else optax.identity(),
        "rmsprop": lambda: optax.chain(
            optax.scale_by_rms(b2, eps), optax.trace(b1) if b1 else optax.identity()
        ),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0)
        ),
    }
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(rules[config.name]())
    if config.weight_decay:
        mask = lambda params: decays(params, config.no_decay)  # noqa: E731
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    if config.name == "lamb":
        parts.append(optax.scale_by_trust_ratio())
    parts.append(optax.scale_by_learning_rate(make_schedule(config, num_steps)))
    return optax.chain(*parts)
