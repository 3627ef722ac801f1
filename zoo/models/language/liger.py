"""Liger: a trained LLaMA becomes a gated recurrent model, without a new parameter.

Lan, Sun, Hu, Du and Cheng, "Liger: Linearizing Large Language Models to Gated Recurrent
Structures", arXiv 2503.01496; official code github.com/OpenSparseLLMs/Linearization (Apache-2.0).
In every layer half of the output is attention to the last 64 tokens, and half a recurrence that
reads the same queries, keys and values before they are turned; its forget gate is the key itself:

    q, k, v = W x;   g = k                                         of LLaMA, key heads repeated
    gla      S_t = diag(exp(log sigmoid(g) / 16)) S_{t-1} + softmax(k) v^T;   o = S_t^T softmax(q)
    hgrn2    S_t = diag(sigmoid(g)) S_{t-1} + (1 - sigmoid(g)) v^T;           o = S_t^T softmax(q)
    gsa      a = log sigmoid(mean of neighbours in g) / 16, one for each of `slots`; s = 1 - exp a
             K_t = diag(exp a) K_{t-1} + s k^T;   V_t = diag(exp a) V_{t-1} + s v^T
             o = V_t^T softmax(K_t q)
    y = W_o (o / 2 + window(R q, R k, v) / 2)

The paper pools the key projection for the gate; in the code the pooling has as many outputs as
inputs for GLA and HGRN2, which makes it the identity, and we follow it. Its window holds the token
itself and 63 before. States are of one size however long the text is. Training freezes all but LoRA
matrices beside query, key and value (rank 8, one stage, next-token loss).

    features            liger_gla_llama3.2_1b
    embed               128  2048    for 128 tokens
    layer0              128  2048    up to layer15
    last_hidden_state   128  2048    behind the last RMSNorm
    logits              128  128256
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import kernels_pallas
from zoo.layers.causal import (
    Context,
    RotaryAttention,
    attention_state,
    causal_attention,
    continue_attention,
    init,
)
from zoo.layers.dense import Dense
from zoo.layers.partition import constrain
from zoo.layers.rotary import Rotary
from zoo.models.language import llama
from zoo.models.language.llama import Llama
from zoo.system import System, Variant

Heads = Float[Array, "batch length heads head_dim"]
State = dict[str, Array]


# -------------------------------------------------------------------------------- recurrences
# Each is `(query, key, value, slots, state, context) -> (output, state)`, in float32.


def gated_linear(
    query: Heads, key: Heads, value: Heads, slots: int, state: State | None, context: Context
) -> tuple[Heads, State]:
    """Gated linear attention: queries and keys are softmaxed, the gate is a mild one."""
    decay = context.hide(jax.nn.log_sigmoid(key) / 16)
    key = context.hide(jax.nn.softmax(key, axis=-1))
    return _linear(jax.nn.softmax(query, axis=-1), key, value, decay, state)


def hgrn2(
    query: Heads, key: Heads, value: Heads, slots: int, state: State | None, context: Context
) -> tuple[Heads, State]:
    """HGRN2: what a channel forgets it reads in."""
    decay = context.hide(jax.nn.log_sigmoid(key))
    key = context.hide(jax.nn.sigmoid(-key))
    return _linear(jax.nn.softmax(query, axis=-1), key, value, decay, state)


def gated_slots(
    query: Heads, key: Heads, value: Heads, slots: int, state: State | None, context: Context
) -> tuple[Heads, State]:
    """Gated slot attention: softmax attention over `slots` keys and values that are forgotten."""
    batch, length, heads, width = key.shape
    pooled = key.reshape(batch, length, heads, slots, width // slots).mean(-1)
    size = context.hide(-jax.nn.log_sigmoid(pooled) / 16)  # log decays are its negative
    small = size < 1e-30  # padding
    write = -jnp.expm1(-size)
    before = state or {"keys": None, "values": None}
    # One head a slot, whose decay is a number; the slots of a head share its keys and queries.
    by_slot = (batch, length, heads * slots)
    scores, keys = kernels_pallas.ssd(
        jnp.where(small, 0.0, write / jnp.where(small, 1.0, size)).reshape(*by_slot, 1),
        size.reshape(by_slot),
        -jnp.ones(heads * slots),
        key,
        query,
        initial_state=before["keys"],
    )
    weights = jax.nn.softmax(scores.reshape(batch, length, heads, slots), axis=-1)
    out, values = kernels_pallas.gated_linear_attention(
        weights, write, value, -size, scale=1.0, initial_state=before["values"]
    )
    return out, {"keys": keys, "values": values}


def _linear(query, key, value, decay, state):
    before = None if state is None else state["memory"]
    out, memory = kernels_pallas.gated_linear_attention(
        query, key, value, decay, scale=1.0, initial_state=before
    )
    return out, {"memory": memory}


KINDS: dict[str, Callable] = {"gla": gated_linear, "hgrn2": hgrn2, "gsa": gated_slots}
"""The recurrences, by the name of the model that they come from."""


# -------------------------------------------------------------------------------------- model


class LigerAttention(nn.Module):
    """Half a recurrence, half attention to a window, of LLaMA's own projections.

    Attributes:
      base: the attention that it stands for; parameters have its names and shapes.
      kind: a key of `KINDS`.
      window: tokens that the attention sees, the query's own included.
      slots: of each key head, for "gsa"; must divide the channels of a head.
      share: of the recurrence in the sum; the attention has the rest.
    """

    base: RotaryAttention
    kind: str = "gla"
    window: int = 64
    slots: int = 64
    share: float = 0.5

    def init_state(self, batch: int, channels: int, length: int) -> State:
        """The memory of the recurrence, and the window; `length` matters below the window only."""
        base, width = self.base, self.base.head_width(channels)
        window = attention_state(
            batch, length, base.num_kv_heads or base.num_heads, width, base.dtype, self.window
        )
        empty = partial(jnp.zeros, dtype=jnp.float32)
        if self.kind != "gsa":
            return window | {"memory": empty((batch, base.num_heads, width, width))}
        keys = empty((batch, base.num_heads * self.slots, width, 1))
        return window | {"keys": keys, "values": empty((batch, base.num_heads, self.slots, width))}

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: State | None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], State | None]:
        """The mixed tokens and, if there is a state, the next one."""
        base = self.base
        batch, length, channels = x.shape
        width, kv_heads = base.head_width(channels), base.num_kv_heads or base.num_heads
        types = {"dtype": base.dtype, "param_dtype": base.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)

        def project(name: str, heads: int) -> Array:
            y = dense(heads * width, use_bias=base.qkv_bias, name=name)(x)
            y = y.reshape(batch, length, heads, width)
            return constrain(y, "batch", "length", "heads", "head_dim")

        def all_heads(y: Array) -> Array:
            return jnp.repeat(y.astype(jnp.float32), base.num_heads // y.shape[2], axis=2)

        query, key, value = (
            project(name, base.num_heads if name == "query" else kv_heads)
            for name in ("query", "key", "value")
        )
        value = context.hide(value)
        recur, after = KINDS[self.kind](
            *map(all_heads, (query, key, value)), self.slots, state, context
        )

        positions = context.positions
        if positions is None:
            positions = jnp.arange(length)[None]
        rotary = Rotary(base.theta, base.scaling)
        query, key = rotary(query, positions), rotary(key, positions)
        if state is None:
            y = causal_attention(query, key, value, context.mask, self.window)
        else:
            y, window = continue_attention(query, key, value, state, context, self.window)
            after = window | after
        y = self.share * recur + (1 - self.share) * y
        y = y.astype(base.dtype).reshape(batch, length, -1)
        out = dense(channels, use_bias=base.out_bias, name="out")(y)
        return out, None if state is None else after


class Liger(Llama):
    """A LLaMA whose attention is `LigerAttention`; its other fields are those of `Llama`.

    Attributes:
      kind: of the recurrence, a key of `KINDS`.
      window: tokens that the attention sees, the query's own included.
      slots: of each key head, for "gsa".
      share: of the recurrence in a layer's output.
      attention_layers: layers that stay softmax attention to all tokens (hybrids).
    """

    window: int | None = 64
    kind: str = "gla"
    slots: int = 64
    share: float = 0.5
    attention_layers: tuple[int, ...] = ()

    def mixers(self) -> list[nn.Module]:
        """The attention of Liger, and LLaMA's own in `attention_layers`."""
        base = self.attention().clone(window=None, parent=None)
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is none of {', '.join(map(repr, KINDS))}.")
        width = base.head_width(self.embed_dim)
        if self.kind == "gsa" and width % self.slots:
            raise ValueError(
                f"slots={self.slots} does not divide {width} channels of a head; choose a divisor."
            )
        own = LigerAttention(base, self.kind, self.window, self.slots, self.share, parent=None)
        return [base if i in self.attention_layers else own for i in range(self.depth)]


def linearize(model: Llama, kind: str = "gla", **fields: Any) -> Liger:
    """The Liger that takes the variables of a LLaMA as they are.

    Args:
      model: a LLaMA.
      kind: of the recurrence, a key of `KINDS`.
      **fields: other fields of `Liger`.
    """
    same = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    same = {name: value for name, value in same.items() if name not in ("parent", "name")}
    return Liger(**same | {"kind": kind, "window": 64} | fields)


_COMMON = dict(
    module=Liger,
    task="language_modelling",
    paper="Liger: Linearizing Large Language Models to Gated Recurrent Structures, "
    "arXiv 2503.01496",
    code="github.com/OpenSparseLLMs/Linearization",
    licence="that of the base model; code Apache-2.0",
)


def _of(name: str, kind: str) -> Variant:
    base = llama.VARIANTS[name]
    return Variant(
        fields={"window": 64, **base.fields, "kind": kind}, params=base.params, files=base.files,
        **_COMMON,
    )  # fmt: skip


VARIANTS: dict[str, Variant] = {
    **{
        f"liger_{kind}_{name}": _of(name, kind)
        for name in ("llama3.2_1b", "llama3.2_3b", "llama3_8b")
        for kind in KINDS
    },
    "liger_test": Variant(
        fields=llama.VARIANTS["llama_test"].fields | dict(window=6, slots=4),
        **_COMMON | dict(licence="none: no published weights"),
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=llama.LAYOUTS)
