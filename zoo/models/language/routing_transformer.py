"""Routing Transformer: each token attends to the tokens of its cluster, found by online k-means.

Roy, Saffar, Vaswani and Grangier, "Efficient Content-Based Sparse Attention with Routing
Transformers", TACL 2021, arXiv 2003.05997; official code
github.com/google-research/google-research/tree/master/routing_transformer (Apache-2.0). We follow
the names and numbers of github.com/lucidrains/routing-transformer (MIT), a port of it. For one
routing head with means m_1 ... m_c (unit vectors) and w = length / c tokens a cluster:

    members of cluster c = the w tokens whose x / |x| has the largest product with m_c
    a member attends to the members; out_i = sum over its clusters / (how many + 1e-5)
    loss = 1e-4 mean (x / |x| - nearest mean)^2;   m <- 0.999 m + 0.001 normalised cluster sums

A token can be in several clusters, or in none: it gets 0. x is the query, which is also the key
(scaled to length one) in a causal model, where a token attends to itself only if it sees no other;
otherwise queries and keys are clustered apart by the same means. Membership looks at the whole
text, so a causal model is causal in its weights only. Other heads are local (`zoo.layers.local`).

The official code differs: x goes through a LayerNorm without scale, members are sorted and their
ranks have learned relative positions, a sum is divided by count + 0.01, and local and routed heads
share one more map. Means are in the collection `batch_stats`, and change with `train=True` where
it is mutable. The first such step puts them among its tokens, as `place_means` does by itself:
means that are longer than the unit vectors of which they are to be means are random ones.

    x = x + [local heads, routing heads](LN(x)) W;   x = x + W2 gelu(W1 LN(x))
    logits = W LN(x) + b

With `cross_attention` behind each layer stands a second one, all of whose heads route: queries of
the text and keys of a `memory` are clustered by the same means, without positions.

    features            routing_transformer_enwik8
    embed               4096  512    for 4,096 tokens
    layer0              4096  512    up to layer5
    last_hidden_state   4096  512    behind the last LayerNorm
    logits              4096  256
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, chain, dense_rules, linear, norm_rules, split, tied
from zoo.layers.causal import check_memory, check_tokens
from zoo.layers.decoder import WholeTexts
from zoo.layers.dense import Dense
from zoo.layers.local import local_attention
from zoo.layers.mlp import gelu
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.residual import FeedForward, ScaleNorm, init, mlp_rules, shift_tokens
from zoo.layers.rotary import Rotary, rotate_pairs, sines_and_cosines
from zoo.system import System, Variant

HIDDEN, SELF = -1e9, -5e4
"""Added to scores of what is not seen, and of a token's own key under a shared map."""

Heads = Float[Array, "batch heads length head_dim"]
Means = Float[Array, "heads clusters head_dim"]


def unit(x: Array) -> Array:
    """`x / |x|` in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def nearest_means(x: Heads, means: Means) -> Int[Array, "batch heads length"]:
    """The mean with the largest product."""
    return jnp.argmax(jnp.einsum("bhld,hcd->bhlc", x, means), -1)


def kmeans_step(x: Heads, means: Means) -> Means:
    """Normalised sums of the vectors nearest to each mean; a mean without any stays."""
    chosen = jax.nn.one_hot(nearest_means(x, means), means.shape[1], dtype=x.dtype)
    sums = jnp.einsum("bhlc,bhld->hcd", chosen, x)
    return jnp.where(chosen.sum((0, 2))[..., None] > 0, unit(sums), means)


def members(x: Heads, means: Means, size: int) -> Int[Array, "batch heads clusters size"]:
    """Which tokens are in each cluster: the `size` nearest ones, the nearest first."""
    return jax.lax.top_k(jnp.einsum("bhld,hcd->bhcl", x, means), size)[1]


def routed_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    q_at: Int[Array, "batch heads clusters size"],
    k_at: Int[Array, "batch heads clusters size"],
    memory: tuple[Float[Array, "heads clusters slots head_dim"], ...],
    *,
    causal: bool,
    shared: bool,
    visible: Bool[Array, "batch length"] | None = None,
    visible_keys: Bool[Array, "batch keys"] | None = None,
    dropout: float = 0.0,
    rng: Array | None = None,
) -> Heads:
    """Attention inside clusters, averaged over the clusters of a token.

    Args:
      query: of all tokens.
      key: of all tokens.
      value: of all tokens.
      q_at: the tokens that ask in each cluster.
      k_at: the tokens that are seen there.
      memory: keys and values that every member of a cluster sees.
      causal: whether only tokens up to the query are seen.
      shared: whether the query is the key, so that a token should look at others.
      visible: False at padding.
      visible_keys: False at padding among the keys.
      dropout: rate on the weights.
      rng: for it.
    """
    batch, heads, clusters, size = q_at.shape

    def gather(t: Array, at: Array) -> Array:
        flat = at.reshape(batch, heads, -1, 1)
        return jnp.take_along_axis(t, flat, 2).reshape(*at.shape, t.shape[-1])

    def real(there: Array, at: Array) -> Array:
        there = jnp.broadcast_to(there[:, None, :, None], (batch, heads, there.shape[1], 1))
        return gather(there, at)[..., 0]

    slots = memory[0].shape[2]
    wide = (batch, *memory[0].shape)
    q = gather(query, q_at)
    k, v = (
        jnp.concatenate([jnp.broadcast_to(m, wide).astype(t.dtype), gather(t, k_at)], 3)
        for m, t in zip(memory, (key, value), strict=True)
    )
    seen = jnp.ones((*q_at.shape, k_at.shape[-1]), bool)
    if causal:
        seen = q_at[..., :, None] >= k_at[..., None, :]
    if visible is not None:
        seen = seen & real(visible, q_at)[..., :, None]
    if visible_keys is not None:
        seen = seen & real(visible_keys, k_at)[..., None, :]
    bias = jnp.where(seen, 0.0, HIDDEN)
    if shared:
        bias = jnp.where(q_at[..., :, None] == k_at[..., None, :], SELF, bias)
    bias = jnp.pad(bias, ((0, 0),) * 4 + ((slots, 0),))
    flat = lambda t: t.reshape(-1, t.shape[3], 1, t.shape[4])  # noqa: E731
    y = kernels_pallas.attention(
        flat(q),
        flat(k),
        flat(v),
        bias=bias.reshape(-1, 1, *bias.shape[3:]),
        dropout=dropout,
        rng=rng,
    ).reshape(batch, heads, clusters * size, -1)
    at = q_at.reshape(batch, heads, -1)
    rows = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None], at
    total = jnp.zeros(query.shape, jnp.float32).at[rows].add(y.astype(jnp.float32))
    count = jnp.zeros(query.shape[:3], jnp.float32).at[rows].add(1.0)
    return (total / (count + 1e-5)[..., None]).astype(query.dtype)


class RoutingAttention(nn.Module):
    """Local heads and routing heads; attributes are those of `RoutingTransformer`."""

    num_heads: int
    head_dim: int
    clusters: int
    window: int
    local_heads: int
    local_window: int
    local_radius: int
    causal: bool
    shared_qk: bool
    memory_slots: int
    decay: float
    commitment: float
    dropout: float = 0.0
    cross: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], context: dict, train: bool = False
    ) -> tuple[Float[Array, "batch length channels"], Float[Array, ""]]:
        """The attended tokens, and the loss of the means.

        `context["visible"]` is False at padding or None; `context["place"]`: see `place_means`.
        With `cross`, keys and values are those of `context["memory"]`.
        """
        batch, length, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        routed = self.num_heads - self.local_heads
        dropping = train and self.dropout > 0
        drops = {"dropout": self.dropout if dropping else 0.0}

        def split_heads(t: Array) -> Array:
            t = t.reshape(batch, t.shape[1], -1, self.head_dim)
            return constrain(t, "batch", "length", "heads", "head_dim")

        outs, loss = [], jnp.zeros(())
        if self.local_heads:
            width = self.local_heads * self.head_dim
            maps = (dense(width, name=f"local_{name}")(x) for name in ("query", "key", "value"))
            local = local_attention(
                *(split_heads(t) for t in maps),
                window=self.local_window,
                before=self.local_radius,
                after=self.local_radius,
                causal=self.causal,
                visible=context["visible"],
                rng=self.make_rng("dropout") if dropping else None,
                **drops,
            )  # fmt: skip
            outs.append(local)
        names = ("query", "value") if self.shared_qk else ("query", "key", "value")
        linear_maps = {n: dense(routed * self.head_dim, use_bias=False, name=n) for n in names}
        source = context["memory"] if self.cross else x
        maps = {n: f(x if n == "query" else source) for n, f in linear_maps.items()}
        if self.cross and self.shared_qk:
            maps["key"] = linear_maps["query"](source)
        if routed:
            maps = {n: split_heads(t) for n, t in maps.items()}
            if not self.cross:
                maps = {n: rotate_pairs(t, jnp.arange(length)) for n, t in maps.items()}
            maps = {n: t.swapaxes(1, 2) for n, t in maps.items()}
            rng = self.make_rng("dropout") if dropping else None
            y, loss = self._route(maps, context, train, rng=rng, **drops)
            outs.append(y.swapaxes(1, 2))
        y = jnp.concatenate(outs, 2).reshape(batch, length, -1)
        return dense(channels, use_bias=False, name="out")(y), loss

    def _route(self, maps: dict, context: dict, train: bool, **drops) -> tuple[Heads, Array]:
        query, value = maps["query"], maps["value"]
        heads, length = query.shape[1:3]
        shape = (heads, self.clusters, self.head_dim)
        means = self.variable(
            "batch_stats",
            "means",
            lambda: jax.random.normal(self.make_rng("params"), shape, self.param_dtype),
        )
        apart = "key" in maps  # else a query is its key
        x = unit(jnp.concatenate([query, maps["key"]], 2)) if apart else unit(query)
        fixed = jax.lax.stop_gradient(x)
        changes = train and self.is_mutable_collection("batch_stats") and not self.is_initializing()
        if context["place"]:
            means.value = place(fixed, self.clusters)
        elif changes:
            means.value = jax.lax.cond(
                jnp.linalg.norm(means.value.astype(jnp.float32), axis=-1).max() > 1.01,
                lambda: place(fixed, self.clusters).astype(means.value.dtype),
                lambda: means.value,
            )
        centres = means.value.astype(jnp.float32)
        near = nearest_means(fixed, centres)
        nearest = jnp.take_along_axis(centres[None], near[..., None], 2)
        loss = self.commitment * jnp.mean(jnp.square(x - nearest))
        q_at = k_at = members(fixed[:, :, :length], centres, min(self.window, length))
        if apart:
            size = min(self.window, x.shape[2] - length)
            k_at = members(fixed[:, :, length:], centres, size)
        if changes:
            step = kmeans_step(fixed, centres)
            means.value = (self.decay * centres + (1 - self.decay) * step).astype(self.param_dtype)
        wide = (heads, self.clusters, self.memory_slots, self.head_dim)
        memory = tuple(
            self.param(f"memory_{n}", nn.initializers.normal(1.0), wide, self.param_dtype)
            for n in ("key", "value")
        )
        key = maps["key"] if apart else unit(query).astype(self.dtype)
        y = routed_attention(
            query, key, value, q_at, k_at, memory, causal=self.causal, shared=self.shared_qk,
            visible=context["visible"],
            visible_keys=context["memory_visible" if self.cross else "visible"], **drops,
        )  # fmt: skip
        return y, loss


def place(x: Heads, clusters: int, steps: int = 10) -> Means:
    """Means after ten rounds of k-means, from evenly spaced vectors of all texts."""
    every = x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])
    start = every[:, np.linspace(0, every.shape[1] - 1, clusters).astype(int)]
    return jax.lax.fori_loop(0, steps, lambda _, means: kmeans_step(x, means), start)


class RoutingLayer(nn.Module):
    """Attention and MLP, each behind a norm; what either adds, and the loss of the means.

    Both are those of `owner`, a layer that may be another one.
    """

    mixer: RoutingAttention  # a template: its copy is the parameter group `attention`
    embed_dim: int
    norm: Callable[..., nn.Module] | None
    shifts: tuple[int, ...] = ()
    gated: bool = False
    activation: Callable[[Array], Array] = gelu
    mlp_dropout: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Its parts."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention = self.mixer.clone()
        self.mlp = FeedForward(
            4 * self.embed_dim, self.gated, self.activation, self.mlp_dropout, **types
        )
        self.drop = nn.Dropout(self.dropout)
        if self.norm is not None:
            self.norm1, self.norm2 = self.norm(**types), self.norm(**types)
        else:
            self.gate1 = self.param("gate1", nn.initializers.zeros, (1,), self.param_dtype)
            self.gate2 = self.param("gate2", nn.initializers.zeros, (1,), self.param_dtype)

    def attend(
        self, x: Array, context: dict, train: bool, owner: "RoutingLayer"
    ) -> tuple[Array, Array]:
        """What attention adds, and the loss."""
        y = x if self.norm is None else self.norm1(x)
        y = shift_tokens(y, self.shifts) if self.shifts else y
        y, loss = owner.attention(y, context, train)
        y = self.drop(y, deterministic=not train)
        return (y if self.norm is not None else y * self.gate1.astype(self.dtype)), loss

    def feed(self, x: Array, train: bool, owner: "RoutingLayer") -> Array:
        """What the MLP adds."""
        y = x if self.norm is None else self.norm2(x)
        y = owner.mlp(shift_tokens(y, self.shifts) if self.shifts else y, train)
        return y if self.norm is not None else y * self.gate2.astype(self.dtype)


class RoutingTransformer(WholeTexts):
    """Routing Transformer with a word head at every token.

    `init_state(batch, length)` and `step(state, tokens)` run the whole text at every step, as which
    tokens are in a cluster depends on all of them.

    Attributes:
      vocab_size: words.
      embed_dim: channels of the layers.
      factor_dim: channels of the embedding and the word head; None: embed_dim.
      head_dim: channels of a head; the heads need not add up to embed_dim.
      max_length: longest text; there are `max_length / window` clusters.
      window: tokens of a cluster.
      local_heads: heads that are local; one number, or one a layer.
      local_window: tokens of their blocks; None: `window`. It divides the length of a text.
      local_radius: blocks before (and, if not causal, behind) its own that a token sees.
      causal: whether tokens see only those before them.
      shared_qk: one map for queries and keys; None: as `causal`.
      memory_slots: learned keys and values of each cluster; at least one if causal and not shared.
      decay: of the moving average of the means.
      commitment: factor of the loss of the means.
      weight_tied: all layers share the attention and the MLP of the first, and those that attend to
        a memory the second's; each has its own norms. Published files repeat these tensors for each
        layer: the first are read, and alone written.
      norm: "layer", "scale" (one learned length) or "rezero" (none, a learned factor instead).
      gated: whether the MLPs are.
      activation: of the MLPs.
      cross_attention: there are 2 `depth` layers, of which every second one attends to a memory.
      memory_shared_qk: one map for queries and the memory's keys.
      tie_embeddings: read the logits off the transposed embedding.
      encodes: there is no word head, and logits are the last hidden state: an encoder, whose
        output is a decoder's memory.
      shift_tokens: half (causal) or two thirds of the channels come from the tokens beside.
      reversible: two streams, whose mean is read. They are trained like a plain stack, which keeps
        all layers' outputs, as the means change on the way.
      attention_dropout: rate on the attention weights.
      layer_dropout: rate on what attention adds.
      dropout: rate in the MLPs.
    """

    vocab_size: int = 256
    embed_dim: int = 512
    factor_dim: int | None = None
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    max_length: int = 4096
    window: int = 128
    local_heads: int | tuple[int, ...] = 0
    local_window: int | None = None
    local_radius: int = 1
    causal: bool = False
    shared_qk: bool | None = None
    memory_slots: int = 0
    decay: float = 0.999
    commitment: float = 1e-4
    weight_tied: bool = False
    norm: str = "layer"
    gated: bool = False
    activation: Callable[[Array], Array] = gelu
    cross_attention: bool = False
    memory_shared_qk: bool = False
    tie_embeddings: bool = False
    encodes: bool = False
    shift_tokens: bool = False
    reversible: bool = False
    attention_dropout: float = 0.0
    layer_dropout: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 4096
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, min(length, self.max_length)), jnp.int32)
        inputs = {"tokens": shape, "mask": shape}
        if self.cross_attention:
            wide = (*shape.shape, self.embed_dim)
            inputs |= {"memory": jax.ShapeDtypeStruct(wide, self.dtype), "memory_mask": shape}
        return inputs

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"] | None = None,
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits at every token; `mask` is 0 or False for padding.

        `memory` is what `cross_attention` looks at, such as an encoder's `last_hidden_state`.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, mask, train, memory, memory_mask)["logits"]

    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"] | None = None,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above), and `aux_loss`, to be added to a loss."""
        return self._run(tokens, mask, train, False, memory, memory_mask)

    def place_means(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"] | None = None,
    ) -> dict[str, Array]:
        """As `features`, after ten rounds of k-means in each layer, as a first step of training.

        Call it as `model.apply(..., method="place_means", mutable="batch_stats")`.
        """
        return self._run(tokens, mask, False, True, memory, memory_mask)

    @nn.compact
    def _run(
        self,
        tokens: Array,
        mask: Array | None,
        train: bool,
        place: bool,
        memory: Array | None = None,
        memory_mask: Array | None = None,
    ) -> dict[str, Array]:
        tokens, mask = check_tokens(self, tokens, mask)
        self._check(tokens.shape[1])
        check_memory(self, tokens, memory, memory_mask)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        width = self.factor_dim or self.embed_dim
        embed = nn.Embed(self.vocab_size, width, embedding_init=init, name="embed", **types)
        x = embed(tokens)
        if width != self.embed_dim:
            x = dense(self.embed_dim, name="project_in")(x)
        x = constrain(x, "batch", "length", "channels")
        out, loss = {"embed": x}, jnp.zeros(())
        context = {"visible": mask, "place": place, "memory": memory}
        context["memory_visible"] = None if memory_mask is None else memory_mask != 0
        streams, kinds = [x, x], 1 + self.cross_attention
        layers = [self._layer(i)(name=f"layers_{i}") for i in range(self.depth * kinds)]
        for i, layer in enumerate(layers):
            owner = layers[i % kinds] if self.weight_tied else layer
            source = streams[1] if self.reversible else x
            y, cost = layer.attend(source, context, train, owner)
            loss = loss + cost
            if self.reversible:
                streams[0] = streams[0] + y
                streams[1] = streams[1] + layer.feed(streams[0], train, owner)
                x = (streams[0] + streams[1]) / 2
            else:
                x = x + y
                x = x + layer.feed(x, train, owner)
            x = out[f"layer{i}"] = constrain(x, "batch", "length", "channels")
        if width != self.embed_dim:
            x = dense(width, name="project_out")(x)
        x = out["last_hidden_state"] = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        if self.encodes:
            return out | {"logits": x, "aux_loss": loss}
        x = embed.attend(x) if self.tie_embeddings else dense(self.vocab_size, name="head")(x)
        return out | {"logits": constrain(x, "batch", "length", "vocab"), "aux_loss": loss}

    def any_length(self) -> tuple[int, int]:
        """The size of the blocks, and how few of them, that one exported program takes."""
        return math.lcm(self.window, self.local_window or self.window), 1

    def local_heads_of(self, i: int) -> int:
        """How many heads of layer `i` are local."""
        i, cross = divmod(i, 2) if self.cross_attention else (i, False)
        if cross:
            return 0
        return self.local_heads if isinstance(self.local_heads, int) else self.local_heads[i]

    def _layer(self, i: int) -> Callable[..., nn.Module]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        cross = bool(self.cross_attention and i % 2)
        causal = self.causal and not cross
        shared = causal if self.shared_qk is None else self.shared_qk
        shared = self.memory_shared_qk if cross else shared
        mixer = RoutingAttention(
            self.num_heads,
            self.head_dim,
            self.max_length // self.window,
            self.window,
            self.local_heads_of(i),
            self.local_window or self.window,
            self.local_radius,
            causal,
            shared,
            max(self.memory_slots, int(causal and not shared)),
            self.decay,
            self.commitment,
            self.attention_dropout,
            cross,
            parent=None,
            **types,
        )
        return partial(
            RoutingLayer,
            mixer,
            self.embed_dim,
            NORMS[self.norm],
            ((0, 1) if self.causal else (-1, 0, 1)) if self.shift_tokens else (),
            self.gated,
            self.activation,
            self.dropout,
            self.layer_dropout,
            **types,
        )

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"This RoutingTransformer reads at most {self.max_length} tokens, not {length}; "
                "cut the text, or create the model with more max_length."
            )
        if self.max_length % self.window:
            raise ValueError(
                f"max_length={self.max_length} should be a multiple of window={self.window}: their "
                "quotient is the number of clusters."
            )
        local = self.local_heads
        local = (local,) * self.depth if isinstance(local, int) else local
        if len(local) != self.depth or not all(0 <= n <= self.num_heads for n in local):
            raise ValueError(
                f"local_heads={self.local_heads} should be 0 to {self.num_heads} heads for each of "
                f"{self.depth} layers."
            )
        if self.weight_tied and len(set(local)) > 1:
            raise ValueError(f"weight_tied=True needs one number of local_heads, not {local}.")
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is none of {', '.join(map(repr, NORMS))}.")


NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "layer": partial(LayerNorm, epsilon=1e-5),
    "scale": ScaleNorm,
    "rezero": None,
}
"""What stands before attention and MLP."""

# ---------------------------------------------------------------------------- checkpoints


def _layout(
    root: str, attention: str, mlp: str, shifted: str, repeated: bool, tied_layers: bool
) -> Rules:
    """Rules of one naming.

    Args:
      root: of the stack.
      attention: the first half of a layer.
      mlp: the second.
      shifted: what stands between where tokens shift.
      repeated: whether the embedding has a second name, that of the word head.
      tied_layers: whether the tensors of the first layers are repeated in the others.
    """
    ours, inner = "layers_{i}", f"{root}{attention}.fn{shifted}"
    attention, mlp = f"{root}{attention}", f"{root}{mlp}"
    local = tuple(f"{ours}/attention/local_{name}" for name in ("query", "key", "value"))

    def suits(model: RoutingTransformer) -> bool:
        return model.weight_tied == tied_layers

    routed = f"{ours}/attention"
    return Rules(
        [
            Rule(("token_emb.weight", "out.tensor"), "embed/embedding", tied, when=suits)
            if repeated
            else Rule("token_emb.weight", "embed/embedding", when=suits),
            *dense_rules("routing_transformer.project_in", "project_in"),
            *dense_rules("routing_transformer.project_out", "project_out"),
            *(
                rule
                for number, half in enumerate((attention, mlp), 1)
                for rule in (
                    *norm_rules(f"{half}.norm", f"{ours}/norm{number}"),
                    Rule(f"{half}.norm.g", f"{ours}/norm{number}/gain"),
                    Rule(f"{half}.residual_weight", f"{ours}/gate{number}"),
                )
            ),
            Rule(
                f"{inner}.local_to_qkv.weight",
                tuple(f"{name}/kernel" for name in local),
                chain(split(0), linear),
            ),
            Rule(f"{inner}.local_to_qkv.bias", tuple(f"{name}/bias" for name in local), split(0)),
            *(
                Rule(f"{inner}.to_{short}.weight", f"{ours}/attention/{name}/kernel", linear)
                for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
            ),
            Rule(f"{inner}.global_attn.mem_key", f"{routed}/memory_key"),
            Rule(f"{inner}.global_attn.mem_value", f"{routed}/memory_value"),
            Rule(f"{inner}.global_attn.kmeans.means", f"batch_stats/{routed}/means"),
            *mlp_rules(f"{mlp}.fn{shifted}.fn", f"{ours}/mlp"),
            *norm_rules("norm", "norm"),
            *dense_rules("out", "head"),
        ],
        derived={
            "sinu_pos_emb.emb": lambda m: np.asarray(sines_and_cosines(m.max_length, m.head_dim)),
            f"{inner}.local_attn.rel_pos.inv_freq": _frequencies,
            f"{inner}.global_attn.kmeans.initted": _placed,
        },
        unused=(
            tuple(
                name.replace("{i}", "*") + ".*"
                for name in (
                    f"{inner}.to_q",
                    f"{inner}.to_k",
                    f"{inner}.to_v",
                    f"{inner}.to_out",
                    f"{inner}.local_to_qkv",
                    f"{inner}.global_attn",
                    f"{mlp}.fn{shifted}",
                )
            )
            if tied_layers
            else ()
        ),
        fresh=("head/*",),
    )


def _frequencies(model: RoutingTransformer, i: int) -> np.ndarray | None:
    frequencies, _ = Rotary().frequencies(model.head_dim, np.zeros(1))
    return np.asarray(frequencies) if model.local_heads_of(i) else None


def _placed(model: RoutingTransformer, i: int) -> np.ndarray | None:
    return np.ones((), bool) if model.local_heads_of(i) < model.num_heads else None


_HALVES = {"": ("layers.layers.{i}.0", "layers.layers.{i}.1"),
           "_reversible": ("layers.blocks.{i}.f.net", "layers.blocks.{i}.g.net")}  # fmt: skip

LAYOUTS = {
    f"lucidrains{factored}{name}{suffix}{end}{same}": _layout(
        root, *halves, shifted, bool(end), bool(same)
    )
    for same in ("", "_tied_layers")
    for end in ("", "_tied")
    for factored, root in (("", "routing_transformer."), ("_factored", "routing_transformer.fn."))
    for suffix, shifted in (("", ""), ("_shifted", ".fn"))
    for name, halves in _HALVES.items()
}

PARTITION = {
    r".*attention/local_(query|key|value)/kernel": ("channels", "heads"),
    r".*attention/local_(query|key|value)/bias": ("heads",),
}

_COMMON = dict(
    module=RoutingTransformer,
    task="language_modelling",
    paper="Efficient Content-Based Sparse Attention with Routing Transformers, arXiv 2003.05997",
    code="github.com/lucidrains/routing-transformer",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    # The example of the repository we follow; then sizes of the paper's models.
    "routing_transformer_enwik8": Variant(
        fields=dict(causal=True, local_heads=(8, 8, 8, 4, 4, 4)), **_COMMON,
    ),
    "routing_transformer_wikitext103": Variant(
        fields=dict(vocab_size=267735, factor_dim=256, embed_dim=1024, depth=14, num_heads=16,
                    max_length=4096, window=512, local_heads=8, causal=True, gated=True),
        **_COMMON,
    ),
    # One cluster of all tokens, so that no membership hangs on rounding.
    "routing_transformer_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, head_dim=16, max_length=64,
                    window=64, local_window=16, local_heads=2, memory_slots=1, causal=True),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION, decay=(r".*memory_(key|value)",)
)
