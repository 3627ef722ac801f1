"""Optimizer state that lives in the hosts' memory and visits the device a leaf at a time.

XLA would prefetch the whole state at once, which saves no memory. So the state of a parameter is
fetched only when that of the parameter before it is back in the host's memory. Rules treat each
parameter by itself. Clipping needs the norm of all gradients, so it is done first; the rule's own
clipping then changes nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from zoo.training.guard import unless
from zoo.training.optimizer import clip_by_global_norm
from zoo.training.step import scaled


def on_host(places: Any, shapes: Any) -> Any:
    """Shardings of an optimizer state, with all but its scalars in pinned host memory."""

    def place(sharding: Any, leaf: Any) -> Any:
        return sharding.with_memory_kind("pinned_host") if leaf.shape else sharding

    return jax.tree.map(place, places, shapes)


def leaf_by_leaf(
    optimizer: optax.GradientTransformationExtraArgs, clip: float | None, places: Any
) -> Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]:
    """The update of a group's leaves, one after the other; see `zoo.training.step.Update`.

    Args:
      optimizer: as `make_optimizer` gives it.
      clip: its largest global norm.
      places: shardings of its state, as `on_host` gives them.
    """
    here = jax.tree.map(lambda s: s.with_memory_kind("device"), places)

    def update(grads: Any, state: Any, params: Any, bad: Any, rates: Any) -> tuple[Any, Any]:
        if clip:
            grads, _ = clip_by_global_norm(clip).update(grads, optax.EmptyState())
        structure = jax.tree.structure(params)

        def like_params(node: Any) -> bool:
            return jax.tree.structure(node) == structure

        def only(i: int, node: Any) -> Any:
            """Of a tree like the parameters, one leaf in its place; anything else as it is."""
            if not like_params(node):
                return node
            leaves: list = [None] * structure.num_leaves
            leaves[i] = jax.tree.leaves(node)[i]
            return jax.tree.unflatten(structure, leaves)

        def take(i: int, tree: Any) -> Any:
            return jax.tree.map(lambda node: only(i, node), tree, is_leaf=like_params)

        new_params, states = [], []
        before: Any = bad
        for i in range(structure.num_leaves):
            old, before = jax.lax.optimization_barrier((take(i, state), before))
            if i:  # behind the barrier, which else would wait for nothing
                new_params[-1], states[-1] = before
            old = jax.device_put(old, take(i, here))
            steps, new = optimizer.update(only(i, grads), old, only(i, params), bad=bad)
            (param,) = jax.tree.leaves(only(i, params))
            (step,) = jax.tree.leaves(steps)
            (rate,) = jax.tree.leaves(only(i, rates))
            param = unless(bad, param + scaled(step, rate), param)
            before = param, jax.device_put(new, take(i, places))
            new_params.append(before[0])
            states.append(before[1])
        return jax.tree.unflatten(structure, new_params), _joined(states, state, like_params)

    return update


def _joined(states: list, like: Any, like_params: Callable[[Any], bool]) -> Any:
    """One state of those of single leaves; what they share is that of the last."""

    def join(node: Any, *parts: Any) -> Any:
        if not like_params(node):
            return parts[-1]
        leaves = [leaf for part in parts for leaf in jax.tree.leaves(part)]
        return jax.tree.unflatten(jax.tree.structure(node), leaves)

    structure = jax.tree.structure(like, is_leaf=like_params)
    nodes = jax.tree.leaves(like, is_leaf=like_params)
    parts = [structure.flatten_up_to(state) for state in states]
    return jax.tree.unflatten(
        structure, [join(*group) for group in zip(nodes, *parts, strict=True)]
    )
