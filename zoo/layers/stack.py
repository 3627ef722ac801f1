"""Deep stacks of equal blocks: unrolled parameters (`layers_0 ...`) and scanned ones (`layers`).

What a block keeps for its backward pass is a choice, too: see `remat_block`.
"""

import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT: dict[str, Callable | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
}
"""Name -> what is kept besides a block's input: nothing, the products with weights, or what
attention needs to go backward without another forward pass (`kernels_pallas.attention`)."""


def remat_block(
    block: type[nn.Module],
    how: bool | str,
    *,
    static_argnums: tuple[int, ...],
    scanned: bool = False,
) -> type[nn.Module]:
    """A block that recomputes in its backward pass what it has not kept.

    Args:
      block: the module class.
      how: a key of `REMAT`; True is "full", False keeps everything.
      static_argnums: arguments of its call that are no arrays, counted with the module as 0.
      scanned: whether it runs in a scan, which by itself keeps the compiler from merging the two
        forward passes.

    Raises:
      ValueError: for an unknown name.
    """
    if not how:
        return block
    name = "full" if how is True else how
    if name not in REMAT:
        raise ValueError(f"remat={how!r} is none of False, True, {', '.join(map(repr, REMAT))}.")
    return nn.remat(
        block, static_argnums=static_argnums, prevent_cse=not scanned, policy=REMAT[name]
    )


def stack_layers(params: dict) -> dict:
    """`{layers_0: p0, layers_1: p1, ...}` -> `{layers: p}` with a leading layer axis, at any depth.

    Raises:
      ValueError: if the layers of a stack are not alike.
    """
    if not isinstance(params, dict):
        return params
    names = sorted(
        (k for k in params if re.fullmatch(r"layers_\d+", k)), key=lambda k: int(k.split("_")[1])
    )
    rest = {k: stack_layers(v) for k, v in params.items() if k not in names}
    if not names:
        return rest
    layers = [stack_layers(params[k]) for k in names]
    shapes = [jax.tree.map(jnp.shape, layer) for layer in layers]
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(f"{name} differs in shape from {names[0]}: they cannot be stacked.")
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: dict) -> dict:
    """The inverse of `stack_layers`."""
    if not isinstance(params, dict):
        return params
    rest = {k: unstack_layers(v) for k, v in params.items() if k != "layers"}
    if "layers" not in params:
        return rest
    stacked = unstack_layers(params["layers"])
    depth = jax.tree.leaves(stacked)[0].shape[0]
    for i in range(depth):
        rest[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return rest
