"""Reversible residual stacks: training memory that does not grow with the depth.

Gomez et al., "The Reversible Residual Network", NeurIPS 2017, arXiv 1707.04585, as the Reformer
uses it. Two streams take turns:

    y1 = x1 + attend(x2);   y2 = x2 + feed(y1)
    x2 = y2 - feed(y1);     x1 = y1 - attend(x2)

The second line gives the inputs of a layer back from its outputs. The backward pass therefore keeps
the last layer's outputs only and computes each layer twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Stream = Float[Array, "batch length channels"]


def run_reversible(
    model: nn.Module,
    layers: Sequence[Callable[..., nn.Module]],
    x1: Stream,
    x2: Stream,
    context: Any = None,
    train: bool = False,
) -> tuple[Stream, Stream]:
    """Both streams after all layers; called in the compact method of a model.

    Args:
      model: gets the parameters `layers_0 ...`.
      layers: make a layer when given `name` or `parent`. A layer has the methods
        `attend(x, context, train)` and `feed(x, context, train)`, which return what is added.
      x1: the stream that attention writes into.
      x2: the stream that attention reads.
      context: a tree of arrays for every layer, such as a mask. It receives no gradient, and other
        collections than `params` neither; they are not changed.
      train: whether to drop out; the second computation drops the same numbers.
    """
    if model.is_initializing():
        for i, make in enumerate(layers):
            layer = make(name=f"layers_{i}")
            x1 = x1 + layer.attend(x2, context, train)
            x2 = x2 + layer.feed(x1, context, train)
        return x1, x2
    params = [model.variables["params"][f"layers_{i}"] for i in range(len(layers))]
    fixed = {name: tree for name, tree in model.variables.items() if name != "params"}
    fixed = [
        {name: tree[f"layers_{i}"] for name, tree in fixed.items() if f"layers_{i}" in tree}
        for i in range(len(layers))
    ]
    context = (context, fixed)
    free = [make(parent=None) for make in layers]
    key = model.make_rng("dropout") if train and model.has_rng("dropout") else None

    def branch(i: int, method: str) -> Callable[..., Stream]:
        def run(params, x, context, key):
            salt = 2 * i + (method == "feed")
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, salt)}
            context, fixed = context
            variables = {"params": params, **fixed[i]}
            return free[i].apply(variables, x, context, train, rngs=rngs, method=method)

        return run

    branches = [(branch(i, "attend"), branch(i, "feed")) for i in range(len(layers))]

    @jax.custom_vjp
    def run(params, x1, x2, context, key):
        for (attend, feed), p in zip(branches, params, strict=True):
            x1 = x1 + attend(p, x2, context, key)
            x2 = x2 + feed(p, x1, context, key)
        return x1, x2

    def forward(params, x1, x2, context, key):
        out = run(params, x1, x2, context, key)
        return out, (params, out, context, key)

    def backward(kept, gradients):
        params, (x1, x2), context, key = kept
        d1, d2 = gradients
        found = []
        for (attend, feed), p in zip(branches[::-1], params[::-1], strict=True):
            y, pull = jax.vjp(lambda p, x, feed=feed: feed(p, x, context, key), p, x1)
            x2 = x2 - y
            dp, dx = pull(d2)
            d1 = d1 + dx
            y, pull = jax.vjp(lambda p, x, attend=attend: attend(p, x, context, key), p, x2)
            x1 = x1 - y
            dq, dx = pull(d1)
            d2 = d2 + dx
            found.append(jax.tree.map(jnp.add, dp, dq))
        return found[::-1], d1, d2, jax.tree.map(_none, context), jax.tree.map(_none, key)

    run.defvjp(forward, backward)
    return run(params, x1, x2, context, key)


def _none(t: Array) -> Any:
    """The gradient of what has none."""
    if jnp.issubdtype(t.dtype, jnp.inexact):
        return jnp.zeros_like(t)
    return np.zeros(t.shape, jax.dtypes.float0)
