"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt

from zoo.tasks import Mean
from zoo.training.guard import first_bad
from zoo.training.state import State

Batch = Mapping[str, Array]


@partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["names"])
@dataclass(frozen=True)
class StepOutput:
    """What a step reports, in one array, so that the host reads one.

    Attributes:
      numbers: bad, grad_norm, learning_rate, and the total and count of each metric.
      names: of the metrics.
    """

    numbers: Float[Array, "n"]
    names: tuple[str, ...]

    @classmethod
    def pack(cls, means: Mapping[str, Mean], grad_norm: Any, learning_rate: Any, bad: Any) -> Self:
        """From the task's metrics, `loss` among them, and what else a step tells."""
        flat = [n for mean in means.values() for n in (mean.total, mean.count)]
        numbers = [bad, grad_norm, learning_rate, *flat]
        return cls(jnp.stack([jnp.asarray(n, jnp.float32) for n in numbers]), tuple(means))

    @property
    def bad(self) -> Float[Array, ""]:
        """-1, or which of `guard.watched(params)` was first not finite; then nothing changed."""
        return self.numbers[0]

    @property
    def grad_norm(self) -> Float[Array, ""]:
        """Global norm of the gradient, before clipping."""
        return self.numbers[1]

    @property
    def learning_rate(self) -> Float[Array, ""]:
        """Of this step."""
        return self.numbers[2]

    @property
    def means(self) -> dict[str, Mean]:
        """The task's metrics."""
        pairs = zip(self.numbers[3::2], self.numbers[4::2], strict=True)
        return {name: Mean(*pair) for name, pair in zip(self.names, pairs, strict=True)}


def make_init(
    model: nn.Module, task: Any, optimizer: optax.GradientTransformation, ema: bool
) -> Callable[[UInt[Array, "words"]], State]:
    """The function from a seed's key data to the first state."""

    def init(rng: UInt[Array, "words"]) -> State:
        variables = dict(model.init(jax.random.wrap_key_data(rng), **task.init_inputs(model)))
        params = variables.pop("params")
        average = jax.tree.map(jnp.copy, params) if ema else None
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, variables, optimizer.init(params), average, rng)

    return init


def make_train_step(
    model: nn.Module,
    task: Any,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    axis: str | None = None,
    update: Callable[[Any, Any, Any, Array], tuple[Any, Any]] | None = None,
) -> Callable[[State, Batch], tuple[State, StepOutput]]:
    """The function `(state, batch) -> (state, output)`.

    The gradient is that of the mean loss over all counted examples of the batch (`count` of the
    task's `loss` metric), whether it is taken at once, in `accumulate` microbatches (rows i, i + n,
    i + 2n, ...) or over the replicas of the `pmap` axis named `axis`.

    A step whose loss or gradient is not finite leaves parameters, collections, optimizer and
    average as they were; only `step` advances, and `bad` says which leaf was first.

    `update` is another way to apply the optimizer than `whole_update`.
    """
    update = update or whole_update(optimizer)

    def loss(params: Any, collections: Any, batch: Batch, rng: Array) -> tuple[Array, Any]:
        value, aux = task.loss(model, {"params": params, **collections}, batch, rng, True)
        return value, (aux["metrics"], {**collections, **aux["collections"]})

    gradient = jax.value_and_grad(loss, has_aux=True)

    def weighted(params: Any, collections: Any, batch: Batch, rng: Array) -> Any:
        """Sums over the counted examples, which add up over microbatches and replicas."""
        (value, (means, collections)), grads = gradient(params, collections, batch, rng)
        count = means["loss"].count
        return (value * count, jax.tree.map(lambda g: g * count, grads), means), collections

    def whole_batch(state: State, batch: Batch, rng: Array) -> Any:
        if accumulate == 1:
            return weighted(state.params, state.collections, batch, rng)
        parts = {name: _microbatches(x, accumulate) for name, x in batch.items()}

        def body(carry: Any, xs: Any) -> Any:
            sums, collections = carry
            index, part = xs
            new, collections = weighted(
                state.params, collections, part, jax.random.fold_in(rng, index)
            )
            return (jax.tree.map(jnp.add, sums, new), collections), None

        first = {name: x[0] for name, x in parts.items()}
        shapes = jax.eval_shape(weighted, state.params, state.collections, first, rng)[0]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        indices = jnp.arange(accumulate)
        return jax.lax.scan(body, (zeros, state.collections), (indices, parts))[0]

    def train_step(state: State, batch: Batch) -> tuple[State, StepOutput]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if accumulate == 1 and axis is None:
            (value, (means, collections)), grads = gradient(
                state.params, state.collections, batch, rng
            )
        else:
            if axis is not None:
                rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
            sums, collections = whole_batch(state, batch, rng)
            if axis is not None:
                sums = jax.lax.psum(sums, axis)
                collections = jax.lax.pmean(collections, axis)
            value, grads, means = sums
            count = jnp.maximum(means["loss"].count, 1.0)
            value, grads = value / count, jax.tree.map(lambda g: g / count, grads)

        bad = first_bad(value, grads)
        params, opt_state = update(grads, state.opt_state, state.params, bad)
        ema = state.ema
        if ema_decay is not None:
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
        collections, ema = _unless(bad, (collections, ema), (state.collections, state.ema))
        output = StepOutput.pack(means, optax.tree.norm(grads), schedule(state.step), bad)
        return State(state.step + 1, params, collections, opt_state, ema, state.rng), output

    return train_step


def whole_update(
    optimizer: optax.GradientTransformation,
) -> Callable[[Any, Any, Any, Array], tuple[Any, Any]]:
    """The function `(grads, state, params, bad) -> (params, state)` that updates all at once."""

    def update(grads: Any, state: Any, params: Any, bad: Array) -> tuple[Any, Any]:
        updates, new_state = optimizer.update(grads, state, params)
        return _unless(bad, (optax.apply_updates(params, updates), new_state), (params, state))

    return update


def _unless(bad: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(bad < 0, n, o), new, old)


def make_eval_step(
    model: nn.Module, task: Any, axis: str | None = None
) -> Callable[[Mapping[str, Any], Batch], dict[str, Any]]:
    """The function `(variables, batch) -> metrics` (`Mean` by name)."""

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
        means = task.metrics(model, variables, batch)
        return means if axis is None else jax.lax.psum(means, axis)

    return eval_step


def in_bfloat16(task: Any) -> Any:
    """A task whose model, having no `dtype` of its own, gets bfloat16 parameters and inputs."""
    return _Bfloat16(task)


@dataclass(frozen=True)
class _Bfloat16:
    task: Any

    def init_inputs(self, model: nn.Module) -> dict[str, Array]:
        return self.task.init_inputs(model)

    def loss(self, model: nn.Module, variables: Any, batch: Batch, rng: Array, train: bool) -> Any:
        value, aux = self.task.loss(
            model, _cast_params(variables), _cast_inputs(model, batch), rng, train
        )
        collections = {
            name: jax.tree.map(lambda new, old: new.astype(old.dtype), tree, variables[name])
            for name, tree in aux["collections"].items()
        }
        return value.astype(jnp.float32), {**aux, "collections": collections}

    def metrics(self, model: nn.Module, variables: Any, batch: Batch) -> Any:
        return self.task.metrics(model, _cast_params(variables), _cast_inputs(model, batch))

    def predict(self, model: nn.Module, variables: Any, batch: Batch) -> Any:
        return self.task.predict(model, _cast_params(variables), _cast_inputs(model, batch))


def _half(x: Array) -> Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def _cast_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {**variables, "params": jax.tree.map(_half, variables["params"])}


def _cast_inputs(model: nn.Module, batch: Batch) -> dict[str, Array]:
    names = model.example_inputs()
    return {name: _half(x) if name in names else x for name, x in batch.items()}


def _microbatches(x: Array, parts: int) -> Array:
    """Rows i, i + n, ... as microbatch i: no row leaves the device it is on."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
