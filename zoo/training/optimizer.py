"""Update rules of optax by name and their schedules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from zoo.errors import ConfigError
from zoo.layers.materialize import materialized
from zoo.tasks.task import Networks
from zoo.training import groups
from zoo.training.config import Optimizer
from zoo.training.guard import unless
from zoo.training.reductions import norm


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


def make_optimizer(
    config: Optimizer, networks: Networks | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping, the rule and decoupled weight decay; the learning rate is the step's.

    The state is a dict by the names of these parts, so that a run can go on with another clip or
    decay.

    Given `bad=`, the index of what was not finite or -1, its `update` leaves the state as it was
    after a bad step; the updates themselves are of no use then.

    Args:
      config: which rule, and its numbers.
      networks: whose systems say which leaves decay.
    """
    b1, b2, eps = config.b1, config.b2, config.eps
    adam = lambda: scale_by_adam(b1, b2, eps)  # noqa: E731
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": adam,
        "adam": adam,
        "nadamw": lambda: scale_by_adam(b1, b2, eps, nesterov=True),
        "lamb": adam,
        "lion": lambda: _kept(optax.scale_by_lion(b1, b2)),
        "sgd": lambda: _kept(optax.trace(b1, config.nesterov) if b1 else optax.identity()),
        "rmsprop": lambda: optax.named_chain(
            ("scale", _kept(optax.scale_by_rms(b2, eps))),
            ("momentum", _kept(optax.trace(b1) if b1 else optax.identity())),
        ),
        "adafactor": lambda: optax.named_chain(
            ("scale", _kept(optax.scale_by_factored_rms(decay_rate=0.8))),
            ("clip", optax.clip_by_block_rms(1.0)),
        ),
    }
    parts = [("clip", clip_by_global_norm(config.clip))] if config.clip else []
    parts.append((STATES.get(config.name, config.name), rules[config.name]()))
    if config.weight_decay:
        parts.append(("decay", _weight_decay(config, networks)))
    if config.name == "lamb":
        parts.append(("trust_ratio", optax.scale_by_trust_ratio()))
    return optax.named_chain(*parts)


STATES = {"adamw": "adam", "nadamw": "adam", "lamb": "adam"}
"""Rules that keep the same moments as another, under one name."""


def scale_by_adam(
    b1: float, b2: float, eps: float, *, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose moments are written where they were before they are used.

    What XLA for CPU fuses, it computes again: with optax's the update of a parameter reads the old
    moments, which are copied first, so that a step of AdamW takes twice the time.
    """

    def update(grads: Any, state: Any, params: Any = None, *, bad: Any = -1, **_: Any) -> Any:
        del params
        count = optax.safe_increment(state.count)
        ahead = 1 - b1 ** optax.safe_increment(count) if nesterov else None
        shared = (1 - b1**count, ahead, 1 - b2**count, jnp.asarray(bad), b1, b2, eps)
        leaves, tree = jax.tree.flatten(grads)
        moments = (tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu))
        each = [_adam(*parts, *shared) for parts in zip(leaves, *moments, strict=True)]
        updates, mu, nu = (tree.unflatten([parts[i] for parts in each]) for i in range(3))
        return updates, optax.ScaleByAdamState(unless(bad, count, state.count), mu, nu)

    init = optax.scale_by_adam(b1, b2, eps).init
    return optax.GradientTransformationExtraArgs(init, update)


@partial(jax.jit, static_argnames=("b1", "b2", "eps"))  # traced once for leaves of one shape
def _adam(
    grad: Float[Array, "*shape"],
    mu: Float[Array, "*shape"],
    nu: Float[Array, "*shape"],
    now: Float[Array, ""],
    ahead: Float[Array, ""] | None,
    squares: Float[Array, ""],
    bad: Int[Array, ""],
    b1: float,
    b2: float,
    eps: float,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The update and moments of a leaf; the sums of their weights are `now`, `ahead`, `squares`.

    With `ahead` the mean looks a step further (Nesterov).
    """
    mu = materialized(unless(bad, optax.tree.update_moment(grad, mu, b1, 1), mu))
    new = optax.tree.update_moment_per_elem_norm(grad, nu, b2, 2)
    nu = materialized(unless(bad, new.astype(nu.dtype), nu))
    mean = mu / now.astype(mu.dtype)
    if ahead is not None:
        mean = b1 * (mu / ahead.astype(mu.dtype)) + (1 - b1) * (grad / now.astype(grad.dtype))
    return mean / (jnp.sqrt(nu / squares.astype(nu.dtype)) + eps), mu, nu


def _kept(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A rule whose state stays as it was after a bad step."""

    def update(grads: Any, state: Any, params: Any = None, *, bad: Any = -1, **_: Any) -> Any:
        updates, new = rule.update(grads, state, params)
        return updates, unless(bad, new, state)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, whose norm XLA for CPU would sum again for every leaf."""

    def clip(updates: Any, _: Any) -> Any:
        whole = materialized(norm(updates))
        return jax.tree.map(
            lambda u: jnp.where(whole < limit, u, u / whole.astype(u.dtype) * limit), updates
        )

    return optax.stateless(clip)


def _weight_decay(config: Optimizer, networks: Networks | None) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        decaying = groups.decays(params, networks, config.no_decay)
        factors = groups.multipliers(params, config.decay_multipliers)

        def one(update: Any, param: Any, decays: bool, factor: Any) -> Any:
            rate = jnp.asarray(config.weight_decay * factor, param.dtype)
            return update + rate * param if decays else update

        return jax.tree.map(one, updates, params, decaying, factors)

    return optax.stateless(add)


def rate_factors(config: Optimizer, networks: Networks, params: Any) -> Any | None:
    """A tree of factors of the learning rate, or None where all are 1."""
    if config.layer_decay == 1 and not config.rate_multipliers:
        return None
    factors = groups.multipliers(params, config.rate_multipliers)
    layers = groups.layer_factors(params, networks, config.layer_decay)
    return jax.tree.map(lambda a, b: a * b, factors, layers)
