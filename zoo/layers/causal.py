"""Causal attention with padding, with a state and over trees of tokens; rotary attention.

A mixer of a decoder is a module `(x, state, train, context) -> (y, state)`. Without a state (None)
it sees the whole sequence and returns None; with one it continues where the state stands, by any
number of tokens. `Context` says which tokens are padding, where they stand in their texts and, for
speculative decoding, which token continues which.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.layers.dense import Dense
from zoo.layers.partition import constrain
from zoo.layers.rotary import Rotary

init = nn.initializers.normal(0.02)


# ------------------------------------------------------------------------- tokens and padding


@flax.struct.dataclass
class Context:
    """What a layer knows of the tokens besides their channels.

    Attributes:
      mask: True for text, False for padding, which nobody sees; None: all is text.
      positions: where each token stands in its text; None: 0, 1, ... of the sequence.
      parents: the tokens are the nodes of a tree: for each the number of the node that it
        continues, below its own; -1: it continues the state. None: they are a sequence.
      segments: of packed sequences: the number of each token's document. Attention stays within a
        document; only models that say so take them.
      memory: what layers of cross-attention look at; None: they are passed over.
      memory_visible: False for what of it is padding; None: all is there.
    """

    mask: Bool[Array, "batch length"] | None = None
    positions: Int[Array, "#batch length"] | None = None
    parents: Int[Array, "length"] | None = None
    segments: Int[Array, "batch length"] | None = None
    memory: Float[Array, "batch keys width"] | None = None
    memory_visible: Bool[Array, "batch keys"] | None = None

    def hide(self, x: Float[Array, "batch length *rest"]) -> Float[Array, "batch length *rest"]:
        """`x` with zeros at padding."""
        if self.mask is None:
            return x
        mask = self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2))
        return jnp.where(mask, x, jnp.zeros((), x.dtype))


def positions_of(mask: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Where each token stands in its text: padding does not count (and stands at 0 before it)."""
    return jnp.maximum(jnp.cumsum(mask != 0, axis=1, dtype=jnp.int32) - 1, 0)


def positions_in(segments: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Where each token of a packed sequence stands in its document."""
    at = jnp.arange(segments.shape[1], dtype=jnp.int32)
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return at - jax.lax.cummax(jnp.where(new, at, 0), axis=1)


def check_memory(
    model: Any, tokens: Array, memory: Array | None, mask: Array | None, optional: bool = False
) -> None:
    """Raises ValueError if a model's `memory` is not what its `cross_attention` looks at.

    `optional` says that there need not be one.
    """
    if not model.cross_attention:
        if memory is not None or mask is not None:
            raise ValueError("This model has cross_attention=False; leave out memory.")
        return
    if memory is None:
        if optional and mask is None:
            return
        raise ValueError(f"memory is missing; give ({len(tokens)}, keys, {model.embed_dim}).")
    if memory.ndim != 3 or memory.shape[::2] != (len(tokens), model.embed_dim):
        raise ValueError(
            f"memory has shape {memory.shape}; it should be ({len(tokens)}, keys, "
            f"{model.embed_dim})."
        )
    if mask is not None and mask.shape != memory.shape[:2]:
        raise ValueError(f"memory_mask has shape {mask.shape}; it should be {memory.shape[:2]}.")


def check_tokens(
    model: nn.Module,
    tokens: Array,
    mask: Array | None = None,
    positions: Array | None = None,
) -> tuple[Array, Bool[Array, "batch length"] | None]:
    """Refuse what are no sequences of the model's token numbers.

    Returns:
      The tokens, with 0 in place of numbers outside the vocabulary at padding, and the mask as
      booleans. Other numbers outside make the embedding NaN where a traced program meets them.

    Raises:
      ValueError: naming type, shape, or the number that is no token.
    """
    name = type(model).__name__
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{name} takes tokens as integers of shape (batch, length), not "
            f"{tokens.dtype} of shape {tokens.shape}; a tokenizer makes them from text."
        )
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"mask has shape {mask.shape}; it should be that of tokens, {tokens.shape}."
        )
    if positions is not None and positions.shape not in (tokens.shape, (1, tokens.shape[1])):
        raise ValueError(
            f"positions have shape {positions.shape}; they should have that of tokens, "
            f"{tokens.shape}."
        )
    check_zero_or_one(mask)
    text = None if mask is None else mask != 0
    if not any(isinstance(t, jax.core.Tracer) for t in (tokens, text)):
        _check_range(name, np.asarray(tokens), text, model.vocab_size)
    inside = (tokens >= 0) & (tokens < model.vocab_size)
    # Out of range, `take` fills with NaN, but a negative number would count from the end.
    outside = model.vocab_size
    if text is None:
        return jnp.where(tokens >= 0, tokens, outside), None
    return jnp.where(inside, tokens, jnp.where(text, outside, 0)), text


def check_zero_or_one(mask: Array | None) -> None:
    """Refuse a mask of floats other than 0 and 1: one that is to be added to scores.

    Raises:
      ValueError: naming a number; a traced mask is not looked at.
    """
    if mask is None or isinstance(mask, jax.core.Tracer):
        return
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        return
    values = np.asarray(mask)
    if (odd := (values != 0) & (values != 1)).any():
        raise ValueError(
            f"mask has the number {values[odd][0]}; give 1 or True for text and 0 for padding (of "
            "a mask that is added to scores: mask == 0)."
        )


def _check_range(name: str, tokens: np.ndarray, text: Array | None, vocab_size: int) -> None:
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if text is not None:
        wrong &= np.asarray(text)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} knows the tokens 0 to {vocab_size - 1}, not {tokens[row, column]} (text "
            f"{row}, place {column}); mask padding, or use the tokenizer that the model was "
            "trained with."
        )


# ---------------------------------------------------------------------------------- attention


def causal_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    mask: Bool[Array, "batch length"] | None = None,
    window: int | None = None,
    segments: Int[Array, "batch length"] | None = None,
    **options: Any,
) -> Float[Array, "batch length heads head_dim"]:
    """Attend to this token and those before it, `window` in all; to no padding.

    A query that sees no key, as padding at the left, gets the mean of all values: softmax of
    equally large negative scores gives that, and transformers' eager attention is compared here.

    Args:
      query: `[batch, length, heads, head_dim]`.
      key: `[batch, length, kv_heads, head_dim]`.
      value: `[batch, length, kv_heads, head_dim]`.
      mask: True for text; None: all is.
      window: tokens that are seen, the query's own included; None: all.
      segments: a token sees those of its own segment only, in place of a mask.
      **options: of `kernels_pallas.attention`.
    """
    visible = kernels_pallas.Causal()
    if window is not None:
        visible = kernels_pallas.SlidingWindow(left=window - 1, right=0)
    if mask is None or segments is not None:
        return kernels_pallas.attention(
            query, key, value, mask=visible, query_segments=segments, **options
        )
    y = kernels_pallas.attention(
        query,
        key,
        value,
        mask=visible,
        query_segments=jnp.ones(mask.shape, jnp.int32),
        key_segments=mask.astype(jnp.int32),
        **options,
    )
    seen = jnp.cumsum(mask, axis=1)
    if window is not None:
        seen = seen - jnp.pad(seen, ((0, 0), (window, 0)))[:, : mask.shape[1]]
    mean = value.mean(1, keepdims=True)
    mean = jnp.repeat(mean, query.shape[2] // value.shape[2], axis=2)
    return jnp.where((seen > 0)[..., None, None], y, mean.astype(y.dtype))


def attention_state(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    window: int | None = None,
) -> dict[str, Array]:
    """What causal attention knows before the first token.

    That is room for the keys and values of `length` tokens, or of the window if that is less;
    `text` says which of them are there and no padding, `filled` (without a window) how many.
    Without a window heads come before tokens, so that a step reads its cache as it lies.
    """
    kept = length if window is None else min(length, window - 1)
    axes = (heads, kept) if window is None else (kept, heads)
    state = {name: jnp.zeros((batch, *axes, head_dim), dtype) for name in ("key", "value")}
    state["text"] = jnp.zeros((batch, kept), bool)
    return state if window is not None else state | {"filled": jnp.zeros((), jnp.int32)}


def continue_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    state: dict[str, Array],
    context: Context,
    window: int | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch length heads head_dim"], dict[str, Array]]:
    """Attend to what the state keeps and to the new tokens, and keep those.

    With a window the oldest fall out of the state. Without, tokens that do not fit into it get NaN.
    The nodes of a tree see the state and their ancestors; they return what `keep_attention` needs,
    in place of the next state.

    Args:
      query: `[batch, length, heads, head_dim]`.
      key: `[batch, length, kv_heads, head_dim]`.
      value: `[batch, length, kv_heads, head_dim]`.
      state: of `attention_state`.
      context: of the new tokens.
      window: tokens that are seen, the query's own included; None: all.
      **options: of `kernels_pallas.attention`.
    """
    kept, length = state["text"].shape[1], key.shape[1]
    text = jnp.ones(key.shape[:2], bool) if context.mask is None else context.mask
    if context.parents is not None:
        depth = depths(context.parents)
        seen = jnp.broadcast_to(state["text"][:, None], (len(key), length, kept))
        above = jnp.broadcast_to(ancestors(context.parents), (len(key), length, length))
        if window is not None:
            seen &= kept - jnp.arange(kept) + depth[:, None] < window
            above &= depth[:, None] - depth < window
        seen = jnp.concatenate([seen, above], axis=2)
        both = (_join(tokens_first(state, n), t) for n, t in (("key", key), ("value", value)))
        y = kernels_pallas.attention(query, *both, bias=seen[:, None], **options)
        return y, {"key": key, "value": value}
    if window is None:
        filled = state["filled"]
        state = write(state, key, value, text)
        at = filled + jnp.arange(length)
        seen = state["text"][:, None] & (jnp.arange(kept) <= at[:, None])
        y = kernels_pallas.attention(
            query,
            tokens_first(state, "key").astype(key.dtype),
            tokens_first(state, "value").astype(value.dtype),
            bias=seen[:, None],
            **options,
        )
        return jnp.where(filled + length <= kept, y, jnp.nan), state
    key, value = _join(state["key"], key), _join(state["value"], value)
    text = _join(state["text"], text)
    at, key_at = kept + jnp.arange(length)[:, None], jnp.arange(kept + length)
    seen = text[:, None] & (key_at <= at) & (key_at > at - window)
    y = kernels_pallas.attention(query, key, value, bias=seen[:, None], **options)
    both = {"key": key, "value": value, "text": text}
    return y, {name: last(t, context.mask, kept) for name, t in both.items()}


def last(
    both: Float[Array, "batch both *rest"], mask: Bool[Array, "batch length"] | None, size: int
) -> Float[Array, "batch size *rest"]:
    """The last `size` of those before and `length` new ones, up to where each text ends."""
    if mask is None:
        return both[:, both.shape[1] - size :]
    end = jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)
    rows = both.shape[1] - mask.shape[1] - size + end[:, None] + jnp.arange(size)
    return jnp.take_along_axis(both, rows.reshape(*rows.shape, *(1,) * (both.ndim - 2)), axis=1)


def keep_attention(
    state: dict[str, Array],
    nodes: dict[str, Array],
    path: Int[Array, "batch depth"],
    accepted: Bool[Array, "batch depth"],
) -> dict[str, Array]:
    """The state after those nodes of a tree that lie on a path; see `continue_attention`.

    Args:
      state: before the tree.
      nodes: what `continue_attention` gave for the tree.
      path: nodes from the root on.
      accepted: which of them count, the first ones of each row.
    """
    key, value = (
        jnp.take_along_axis(nodes[name], path[..., None, None], axis=1) for name in ("key", "value")
    )
    if "filled" in state:
        filled = state["filled"] + accepted.sum(1).max()
        return write(state, key, value, accepted) | {"filled": filled}
    new, kept = {"key": key, "value": value, "text": accepted}, state["text"].shape[1]
    return {name: last(_join(state[name], t), accepted, kept) for name, t in new.items()}


def write(
    state: dict[str, Array],
    key: Float[Array, "batch length heads key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    text: Bool[Array, "batch length"],
) -> dict[str, Array]:
    """A state of attention without a window, with new tokens behind those that it has."""
    filled = state["filled"]

    def put(old, new, axis):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), filled, axis)

    return {
        "key": put(state["key"], key.swapaxes(1, 2), 2),
        "value": put(state["value"], value.swapaxes(1, 2), 2),
        "text": put(state["text"], text, 1),
        "filled": filled + key.shape[1],
    }


def tokens_first(state: dict[str, Array], name: str) -> Float[Array, "batch length heads head_dim"]:
    """The keys or values of a state, as `kernels_pallas.attention` takes them."""
    return state[name].swapaxes(1, 2) if "filled" in state else state[name]


def _join(before, after):
    return jnp.concatenate([before.astype(after.dtype), after], axis=1)


def ancestors(parents: Int[Array, "nodes"]) -> Bool[Array, "nodes nodes"]:
    """Whether node j (second axis) is node i or one of its ancestors."""
    nodes = len(parents)
    reach = jnp.eye(nodes, dtype=bool) | (parents[:, None] == jnp.arange(nodes))
    for _ in range(nodes.bit_length()):
        reach = (reach[:, :, None] & reach).any(1)
    return reach


def depths(parents: Int[Array, "nodes"]) -> Int[Array, "nodes"]:
    """How many ancestors each node has."""
    return ancestors(parents).sum(1) - 1


class RotaryAttention(nn.Module):
    """Causal softmax attention with rotary positions, grouped keys and an optional window.

    Attributes:
      num_heads: query heads; must divide the channels if there is no `head_dim`.
      num_kv_heads: key and value heads; None: as many as query heads.
      window: tokens that a query sees, itself included; None: all.
      theta: base of the rotary frequencies.
      qkv_bias: whether query, key and value have biases.
      head_dim: channels of a head; None: the channels over the heads.
      scaling: of the frequencies, one of `zoo.layers.rotary`, or None.
      out_bias: whether the output has a bias.
      dropout: rate on the attention weights.
    """

    num_heads: int
    num_kv_heads: int | None = None
    window: int | None = None
    theta: float = 10000.0
    qkv_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    head_dim: int | None = None
    scaling: Callable | None = None
    out_bias: bool = False
    dropout: float = 0.0

    def head_width(self, channels: int) -> int:
        """Channels of a head."""
        if self.head_dim is not None:
            return self.head_dim
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a "
                "divisor, or give head_dim."
            )
        return channels // self.num_heads

    def init_state(self, batch: int, channels: int, length: int) -> dict[str, Array]:
        """Room for the keys and values of `length` tokens, or of the window if that is less."""
        heads, width = self.num_kv_heads or self.num_heads, self.head_width(channels)
        return attention_state(batch, length, heads, width, self.dtype, self.window)

    def keep(self, state, nodes, path, accepted):
        """See `keep_attention`."""
        return keep_attention(state, nodes, path, accepted)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: dict | None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], dict | None]:
        """The attended tokens and, if there is a state, the next one."""
        batch, length, channels = x.shape
        width = self.head_width(channels)
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(
                f"num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}; choose a "
                "divisor."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)

        def project(name, heads):
            y = dense(heads * width, use_bias=self.qkv_bias, name=name)(x)
            y = y.reshape(batch, length, heads, width)
            return constrain(y, "batch", "length", "heads", "head_dim")

        rotary = Rotary(self.theta, self.scaling)
        positions = context.positions
        if positions is None:
            positions = jnp.arange(length)[None]
        query = rotary(project("query", self.num_heads), positions)
        key = rotary(project("key", kv_heads), positions)
        value = project("value", kv_heads)
        if state is None:
            dropping = train and self.dropout > 0
            y = causal_attention(
                query,
                key,
                value,
                context.mask,
                self.window,
                dropout=self.dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
            )
        else:
            y, state = continue_attention(query, key, value, state, context, self.window)
        y = y.reshape(batch, length, -1)
        return dense(channels, use_bias=self.out_bias, name="out")(y), state
