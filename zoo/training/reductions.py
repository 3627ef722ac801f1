"""One number of all leaves of a tree: its norm, and the first leaf that is not finite.

XLA for CPU sums a large array by one call of a library, and a small one by up to four programs of
its own, which it compiles for every leaf; two of three leaves of a transformer are small. X
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from zoo.layers.materialize import materialized

SMALL = 1 << 14
"""Numbers that a small leaf has at most."""


def norm(tree: Any) -> Float[Array, ""]:
    """Global norm of the leaves, 0 if there are none."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros(())

    def joined(*leaves: Array) -> Array:
        # not x * x, which an optimizer has too: what is read twice is kept, and summed from there
        parts = _joined(lambda x: x * -x, leaves)
        return jnp.sqrt(-sum(jnp.sum(numbers) for _, numbers in parts))

    def apart(*leaves: Array) -> Array:
        return optax.tree.norm(leaves)

    return jax.lax.platform_dependent(*leaves, cpu=_alone(joined, apart), default=apart)


def first_not_finite(leaves: Sequence[Array]) -> Int[Array, ""]:
    """Index of the first leaf with a number that is not finite, or -1 if there is none."""
    return jax.lax.platform_dependent(*leaves, cpu=_alone(_first_of_joined, _first), default=_first)


def _alone(one: Callable[..., Array], spread: Callable[..., Array]) -> Callable[..., Array]:
    """The first on one device; over a mesh, where joined leaves would travel, the second."""
    return spread if jax.sharding.get_abstract_mesh().size > 1 else one


def _first(*leaves: Array) -> Array:
    fine = jnp.stack([jnp.isfinite(x).all() for x in leaves])
    return jnp.where(fine.all(), -1, jnp.argmin(fine)).astype(jnp.int32)


def _first_of_joined(*leaves: Array) -> Array:
    none = jnp.int32(len(leaves))
    found = [none]
    for sizes, zeros in _joined(lambda x: x * 0, leaves):  # zero, or not finite
        wrong = ~jnp.isfinite(zeros)
        ends = np.array(list(itertools.accumulate(sizes.values())), np.int32)
        owner = jnp.array(list(sizes), jnp.int32)[jnp.sum(jnp.argmax(wrong) >= ends[:-1])]
        found.append(jnp.where(wrong.any(), owner, none))
    first = jnp.stack(found).min()
    return jnp.where(first == none, -1, first)


def _joined(
    function: Callable[[Array], Array], leaves: Sequence[Array]
) -> Iterator[tuple[dict[int, int], Float[Array, "numbers"]]]:
    """`function` of all numbers of the small leaves, and its sums over the rows of the large ones.

    With each the indices of the leaves, and how many numbers there are of each.
    """
    small = {i: x.ravel() for i, x in enumerate(leaves) if x.size <= SMALL}
    large = {i: x.reshape(-1, x.shape[-1]) for i, x in enumerate(leaves) if x.size > SMALL}
    if small:
        sizes = {i: x.size for i, x in small.items()}
        yield sizes, function(materialized(jnp.concatenate(list(small.values()))))
    if large:
        sums = {i: jnp.sum(function(x), axis=1) for i, x in large.items()}
        sizes = {i: x.size for i, x in sums.items()}
        yield sizes, materialized(jnp.concatenate(list(sums.values())))
