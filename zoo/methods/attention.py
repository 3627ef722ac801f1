"""How methods reach inside attention without an edit of any model's file.

Attention of the zoo is a module whose children are `query key value` (or a fused `qkv`) and `out`.
`rewritten` runs such a module while it listens to these children, and gives `out` another context
than the one that the module computed: that is dead code, which the compiler removes.

    query, key, value: what the maps gave, split into heads
    context = mix(Heads(...))                          in place of the module's own
    y = out(context)

Known are `zoo.layers.attention.Attention` (its mask is the argument `visible`) and the causal ones
of GPT-2 (`CausalAttention`) and OPT (`SeparateAttention`); a module with other masks, biases or
rotations is refused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.layers.attention import Attention
from zoo.methods.method import outermost


class Heads(NamedTuple):
    """What one call of attention works with.

    Attributes:
      module: the attention, whose scope can be given leaves.
      x: its input.
      query: (and key, value) of all heads.
      scale: factor on `query . key`.
      visible: which keys each query may see; None: all.
    """

    module: nn.Module
    x: Float[Array, "batch length channels"]
    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length heads head_dim"]
    value: Float[Array, "batch length heads head_dim"]
    scale: float
    visible: Bool[Array, "batch #heads #queries keys"] | None

    def scores(self, hidden: float = -1e30) -> Float[Array, "batch heads queries keys"]:
        """The logits in float32; `hidden` where a key may not be seen."""
        query, key = (each.astype(jnp.float32) for each in (self.query, self.key))
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key) * self.scale
        return scores if self.visible is None else jnp.where(self.visible, scores, hidden)


def is_attention(module: nn.Module) -> bool:
    """Whether `rewritten` knows it."""
    causal = type(module).__name__ in ("SeparateAttention", "CausalAttention")
    return isinstance(module, Attention) or causal


def _plain(child: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Array:
    return call(*args, **kwargs)


def rewritten(
    call: Callable,
    args: tuple,
    kwargs: dict,
    module: nn.Module,
    mix: Callable[[Heads], Float[Array, "batch length heads head_dim"]],
    run: Callable[[nn.Module, Callable, tuple, dict], Array] = _plain,
) -> Any:
    """The module's output with another context.

    Args:
      call: of the module, as an interceptor gets it.
      args: of the call.
      kwargs: likewise.
      module: an attention.
      mix: gives the context of all heads.
      run: gives the output of a child, from it and its call, other methods included.

    Raises:
      ValueError: for a module with options that this does not know.
    """
    x, visible = args[0], _visible(module, args, kwargs)
    if getattr(module, "query_key_norm", False):
        raise ValueError(
            f"{'/'.join(module.path)} normalises queries and keys, which methods on attention do "
            "not know; leave it out of their targets."
        )
    if getattr(module, "attention_dropout", 0.0) and kwargs.get("train", False):
        raise ValueError("Methods on attention do not drop out its weights: attention_dropout=0.")
    given: dict[str, Array] = {}

    def listen(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        child = context.module
        if child.parent is not module or context.method_name != "__call__":
            return call(*args, **kwargs)
        if child.name == "out":
            heads = (*x.shape[:2], module.num_heads, -1)
            if "qkv" in given:
                parts = jnp.split(given["qkv"], 3, axis=-1)
            else:
                parts = [given[name] for name in ("query", "key", "value")]
            query, key, value = (part.reshape(heads) for part in parts)
            scale = getattr(module, "scale", None)
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            context = mix(Heads(module, x, query, key, value, scale, visible))
            args = (context.reshape(args[0].shape).astype(args[0].dtype), *args[1:])
            return run(child, call, args, kwargs)
        given[child.name] = run(child, call, args, kwargs)
        return given[child.name]

    with outermost(listen):
        return call(*args, **kwargs)


def _visible(module: nn.Module, args: tuple, kwargs: dict) -> Array | None:
    if isinstance(module, Attention):
        visible = args[1] if len(args) > 1 else kwargs.get("visible")
        return None if visible is None else visible[:, None, None, :]
    state = args[1] if len(args) > 1 else kwargs.get("state")
    if state is not None:
        raise ValueError(
            f"{'/'.join(module.path)} continues from a state, which methods on attention do not "
            "know; call it with whole texts."
        )
    length = args[0].shape[1]
    context = args[3] if len(args) > 3 else kwargs.get("context")
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    mask = getattr(context, "mask", None)
    return causal if mask is None else causal & (mask != 0)[:, None, None, :]
