"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from zoo.layers.materialize import materialized
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, Networks, Phase, Task
from zoo.training.guard import first_bad, unless
from zoo.training.precision import Precision
from zoo.training.reductions import norm
from zoo.training.state import State
from zoo.training.tree import join, split

TURN = 0x7475726E  # what the step's key is folded with in its second phase, and on

Update = Callable[[Any, Any, Any, Array, Any], tuple[Any, Any]]
"""`(grads, opt_state, params, bad, rates) -> (params, opt_state)` of one group."""


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
        """Index in `guard.watched` of the first that was not finite, or -1.

        A bad step leaves the state unchanged.
        """
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


@dataclass(frozen=True)
class Group:
    """How the leaves of one optimizer group are updated.

    Attributes:
      update: applies gradients.
      schedule: learning rate by step.
      factors: `params -> ` factors of the learning rate by leaf, or None.
    """

    update: Update
    schedule: Callable[[Any], Any]
    factors: Callable[[Any], Any | None]

    def apply(
        self, grads: Any, opt_state: Any, params: Any, bad: Array, step: Array
    ) -> tuple[Any, Any]:
        """New parameters and optimizer state; the old ones if `bad` is not -1."""
        rate = materialized(-jnp.asarray(self.schedule(step)))
        factors = self.factors(params)
        rates = jax.tree.map(lambda _: rate, params) if factors is None else None
        rates = rates or jax.tree.map(lambda factor: rate * factor, factors)
        return self.update(grads, opt_state, params, bad, rates)


def turns(phases: tuple[Phase, ...]) -> list[tuple[str, Phase]]:
    """The phases of a step one by one, repeats included, each with its name in the metrics."""
    many = len(phases) > 1
    return [(f"{p.name}/" if many else "", p) for p in phases for _ in range(p.repeats)]


def make_train_step(
    networks: Networks,
    task: Task,
    groups: Mapping[str, Group],
    assigned: Mapping[str, str | None],
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    axis: str | None = None,
    precision: Precision | None = None,
) -> Callable[[State, Batch], tuple[State, StepOutput]]:
    """The function `(state, batch) -> (state, output)`.

    The gradient is that of the mean loss over all counted examples of the batch (`count` of the
    task's `loss` metric), whether it is taken at once, in `accumulate` microbatches (rows i, i + n,
    i + 2n, ...) or over the replicas of the `pmap` axis named `axis`. It is taken in each phase of
    the task, one after the other, of the leaves that the phase trains and of no others.

    A step whose loss or gradient is not finite, in any phase, leaves everything as it was; only
    `step` advances, and `bad` says which leaf was first.

    Args:
      networks: with their methods.
      task: whose phases make up the step.
      groups: how each optimizer group is updated.
      assigned: path of each leaf -> its group, see `zoo.training.groups.assign`.
      accumulate: microbatches.
      ema_decay: of the running mean, or None.
      axis: of `pmap`, or None.
      precision: what is cast before the task sees it.
    """
    precision = precision or Precision(networks)
    phases = turns(task.phases)

    def gradient_of(phase: Phase) -> Callable:
        def loss(
            params: Any, others: Any, collections: Any, carry: Any, batch: Batch, rng: Array
        ) -> tuple[Array, Any]:
            variables = {"params": join(params, others), **collections}
            value, aux = task.loss(
                networks, precision.variables(variables), carry, precision.batch(batch), rng,
                phase.name,
            )  # fmt: skip
            new = {
                name: jax.tree.map(lambda new, old: new.astype(old.dtype), tree, collections[name])
                for name, tree in aux.collections.items()
            }
            kept = carry if aux.carry is None else aux.carry
            return value.astype(jnp.float32), (dict(aux.metrics), {**collections, **new}, kept)

        return jax.value_and_grad(loss, has_aux=True)

    def weighted(gradient: Callable, *args: Any) -> Any:
        """Sums over the counted examples, which add up over microbatches and replicas."""
        (value, (means, collections, carry)), grads = gradient(*args)
        count = means["loss"].count
        sums = (value * count, jax.tree.map(lambda g: g * count, grads), means)
        return sums, collections, carry

    def whole_batch(
        gradient: Callable, params: Any, others: Any, collections: Any, carry: Any, batch: Batch,
        rng: Array,
    ) -> Any:  # fmt: skip
        if accumulate == 1:
            return weighted(gradient, params, others, collections, carry, batch, rng)
        cut = partial(_microbatches, parts=accumulate)
        parts, carries = jax.tree.map(cut, dict(batch)), jax.tree.map(cut, carry)

        def body(before: Any, xs: Any) -> Any:
            sums, collections = before
            index, part, carry = xs
            key = jax.random.fold_in(rng, index)
            new, collections, carry = weighted(
                gradient, params, others, collections, carry, part, key
            )
            return (jax.tree.map(jnp.add, sums, new), collections), carry

        first = jax.tree.map(lambda x: x[0], (carries, parts))
        shapes = jax.eval_shape(
            partial(weighted, gradient), params, others, collections, *first, rng
        )[0]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        xs = (jnp.arange(accumulate), parts, carries)
        (sums, collections), carries = jax.lax.scan(body, (zeros, collections), xs)
        carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), carries)
        return sums, collections, carry

    def gradients(
        phase: Phase, params: Any, others: Any, collections: Any, carry: Any, batch: Batch,
        rng: Array,
    ) -> Any:  # fmt: skip
        gradient = gradient_of(phase)
        if accumulate == 1 and axis is None:
            (value, (means, collections, carry)), grads = gradient(
                params, others, collections, carry, batch, rng
            )
            return value, grads, means, collections, carry
        if axis is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
        sums, collections, carry = whole_batch(
            gradient, params, others, collections, carry, batch, rng
        )
        if axis is not None:
            sums = jax.lax.psum(sums, axis)
            collections = jax.lax.pmean(collections, axis)
        value, grads, means = sums
        count = jnp.maximum(means["loss"].count, 1.0)
        return value / count, jax.tree.map(lambda g: g / count, grads), means, collections, carry

    def train_step(state: State, batch: Batch) -> tuple[State, StepOutput]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        params, opt_state = state.params, dict(state.opt_state)
        collections, carry = state.collections, state.carry
        metrics: dict[str, Mean] = {}
        norms, bads, watched = {}, [], 0
        for turn, (prefix, phase) in enumerate(phases):
            chosen, rest = split(params, lambda path, phase=phase: assigned[path] in phase.groups)
            key = rng if turn == 0 else jax.random.fold_in(rng, TURN + turn)
            value, grads, means, collections, carry = gradients(
                phase, chosen, join(rest, state.frozen), collections, carry, batch, key
            )
            metrics |= {prefix + name: mean for name, mean in means.items()}
            norms[prefix] = materialized(norm(grads))
            bad = materialized(first_bad(value, grads))
            bads.append(jnp.where(bad < 0, bad, bad + watched))
            watched += 1 + len(jax.tree.leaves(grads))
            for name in phase.groups:
                mine = lambda path, name=name: assigned[path] == name  # noqa: E731
                own, _ = split(chosen, mine)
                if own:
                    own, opt_state[name] = groups[name].apply(
                        split(grads, mine)[0], opt_state[name], own, bad, state.step
                    )
                    rest = join(rest, own)
            params = rest
        bad = bads[0]
        for other in bads[1:]:
            bad = jnp.where(bad < 0, other, bad)
        ema = state.ema
        if ema_decay is not None:
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
        new, old = (collections, carry, ema), (state.collections, state.carry, state.ema)
        if len(phases) > 1:  # a good phase is taken back, too, if another was bad
            new, old = (*new, params, opt_state), (*old, state.params, dict(state.opt_state))
            *new, params, opt_state = unless(bad, new, old)
        else:
            new = unless(bad, new, old)
        collections, carry, ema = new
        grad_norm = norms[""] if len(norms) == 1 else norm(norms)
        rate = groups[phases[0][1].groups[0]].schedule(state.step)
        output = StepOutput.pack(metrics, grad_norm, rate, bad)
        state = State(
            state.step + 1, params, state.frozen, collections, carry, opt_state, ema, state.rng
        )
        return state, output

    return train_step


def whole_update(optimizer: optax.GradientTransformationExtraArgs) -> Update:
    """The update of all leaves of a group at once."""

    def update(grads: Any, state: Any, params: Any, bad: Array, rates: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params, bad=bad)
        updates = jax.tree.map(scaled, updates, rates)
        return unless(bad, optax.apply_updates(params, updates), params), state

    return update


def scaled(update: Array, rate: Any) -> Array:
    """An update times a rate, in the type of the update."""
    return update * jnp.asarray(rate, update.dtype)


def make_eval_step(
    networks: Networks, task: Task, axis: str | None = None, precision: Precision | None = None
) -> Callable[[Mapping[str, Any], Batch], dict[str, Any]]:
    """The function `(variables, batch) -> metrics` (`Mean` by name)."""
    precision = precision or Precision(networks)

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
        means = task.metrics(networks, precision.variables(variables), precision.batch(batch))
        return means if axis is None else jax.lax.psum(means, axis)

    return eval_step


def _microbatches(x: Array, parts: int) -> Array:
    """Rows i, i + n, ... as microbatch i: no row leaves the device it is on."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
