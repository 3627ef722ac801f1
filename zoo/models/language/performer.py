"""Performer: softmax attention estimated by random features, at linear cost (FAVOR+).

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, arXiv 2009.14794; official
code github.com/google-research/google-research/tree/master/performer (Apache-2.0). We follow the
names and numbers of github.com/lucidrains/performer-pytorch (MIT), a port of it. For one head with
fixed random rows w_1 ... w_m of width d, orthogonal in blocks of d, and x~ = x / d^(1/4):

    phi(x)_r = m^(-1/2) [ exp(w_r . x~ - |x~|^2 / 2 - c) + 1e-4 ]
    E phi(q).phi(k) = exp(q.k / sqrt d)                            without c and the 1e-4
    out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)      j <= i in a causal model

c is the largest w_r . x~: of the token for queries, of all tokens for keys. That one number lets
later tokens change earlier outputs by the little that 1e-4 weighs; `strict=True` bounds the keys by
|w_r| |x~| instead, which sees no other token, and gives models with states. Other features:
`generalized` (activation(w_r . x~) + 1e-3) and none (`projected=False`: a softmax over channels).

    x = E[token] + P[position];   x = x + attention(LN(x));   x = x + W2 gelu(W1 LN(x))
    logits = W LN(x) + b

With `cross_attention` behind each layer stands a second one, whose attention is to a `memory`: the
decoder of the repository's encoder-decoder.

    features            performer_imagenet64
    embed               2048  512    for 2,048 tokens
    layer0              2048  512    up to layer5
    last_hidden_state   2048  512    behind the last LayerNorm
    logits              2048  256
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules, squeeze
from zoo.layers import decoder
from zoo.layers.causal import Context, check_memory, check_tokens, check_zero_or_one
from zoo.layers.decoder import WholeTexts
from zoo.layers.dense import Dense
from zoo.layers.local import local_attention
from zoo.layers.mlp import gelu
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.residual import ResidualLayer, ScaleNorm, init, mlp_rules
from zoo.layers.reversible import run_reversible
from zoo.layers.rotary import Rotary, rotate_pairs, sines_and_cosines
from zoo.system import System, Variant

Heads = Float[Array, "batch length heads head_dim"]
Features = Float[Array, "batch length heads features"]


def orthogonal_features(
    key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32, scaling: int = 0
) -> Float[Array, "features head_dim"]:
    """Random rows, orthogonal in blocks of `head_dim`.

    Args:
      key: of `jax.random`.
      shape: rows and columns.
      dtype: of the result.
      scaling: 0: rows as long as normal ones are; 1: all of length sqrt(head_dim).
    """
    rows, columns = shape
    key, lengths = jax.random.split(key)
    count = -(-rows // columns)
    blocks = jax.random.normal(key, (count, columns, columns))
    q, r = jnp.linalg.qr(blocks)
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]  # else no direction is uniform
    directions = q.swapaxes(1, 2).reshape(count * columns, columns)[:rows]
    if scaling == 1:
        length = jnp.full((rows, 1), math.sqrt(columns))
    else:
        normal = jax.random.normal(lengths, (rows, columns))
        length = jnp.linalg.norm(normal, axis=1, keepdims=True)
    return (length * directions).astype(dtype)


def softmax_features(
    x: Heads,
    features: Float[Array, "features head_dim"],
    *,
    is_query: bool,
    epsilon: float = 1e-4,
    strict: bool = False,
) -> Features:
    """Phi of the module, in float32; `strict` bounds keys without a look at other tokens."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    dash = jnp.einsum("blnd,md->blnm", x, features)
    half_square = jnp.sum(x * x, -1, keepdims=True) / 2
    if is_query:
        bound = dash.max(-1, keepdims=True)
    elif strict:
        bound = half_square * 0
    else:
        bound = dash.max((1, 3), keepdims=True)
    weights = jnp.exp(dash - half_square - jax.lax.stop_gradient(bound))
    return features.shape[0] ** -0.5 * (weights + epsilon)


def linear_attention(query: Features, key: Features, value: Heads, causal: bool) -> Heads:
    """`sum_j (q_i.k_j) v_j / sum_j q_i.k_j` over all j, or j <= i, in float32."""
    ones = jnp.ones((*value.shape[:3], 1), jnp.float32)
    value = jnp.concatenate([value.astype(jnp.float32), ones], -1)
    if causal:
        return _causal_sums(query, key, value, None)[0]
    context = jnp.einsum("blnm,blnd->bnmd", key, value)
    y = jnp.einsum("blnm,bnmd->blnd", query, context)
    return y[..., :-1] / y[..., -1:]


def _causal_sums(
    query: Features, key: Features, value: Heads, state: Array | None
) -> tuple[Heads, Array]:
    """Causal attention to values that end in a one, and the sums after the last token."""
    y, state = kernels_pallas.gated_linear_attention(
        query, key, value, None, scale=1.0, initial_state=state
    )
    return y[..., :-1] / (y[..., -1:] + 1e-6 * query.sum(-1, keepdims=True)), state


def continue_linear(
    query: Features, key: Features, value: Heads, state: Float[Array, "batch heads features more"]
) -> tuple[Heads, Float[Array, "batch heads features more"]]:
    """Causal linear attention behind what the state sums: keys times values, and keys alone."""
    ones = jnp.ones((*value.shape[:3], 1), jnp.float32)
    return _causal_sums(query, key, jnp.concatenate([value.astype(jnp.float32), ones], -1), state)


class PerformerAttention(nn.Module):
    """Heads of random features, and heads of local softmax attention behind them.

    Attributes are those of `Performer`; `local_heads` is this layer's number. The state of a
    recurrent layer is what `continue_linear` sums. With `cross`, keys and values are those of
    `context["memory"]`, of which `context["memory_visible"]` is seen.
    """

    num_heads: int
    head_dim: int
    features: int
    causal: bool = False
    local_heads: int = 0
    local_window: int = 256
    generalized: bool = False
    projected: bool = True
    kernel: Callable[[Array], Array] = jax.nn.relu
    strict: bool = False
    rotary: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    attention_dropout: float = 0.0
    cross: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        context: dict[str, Any],
        train: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Attend; `context["visible"]` is False at padding, or None.

        With `context["state"]` the next state comes first.
        """
        batch, length, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        width = self.num_heads * self.head_dim
        source = context["memory"] if self.cross else x
        query, key, value = (
            constrain(
                dense(width, use_bias=self.qkv_bias, name=name)(t).reshape(
                    *t.shape[:2], self.num_heads, self.head_dim
                ),
                "batch", "length", "heads", "head_dim",
            )
            for name, t in (("query", x), ("key", source), ("value", source))
        )  # fmt: skip
        shape = (self.features, self.head_dim)
        features = self.variable(
            "batch_stats",
            "features",
            lambda: orthogonal_features(self.make_rng("params"), shape, self.param_dtype),
        ).value.astype(jnp.float32)
        cut = self.num_heads - self.local_heads
        visible = context["memory_visible" if self.cross else "visible"]
        if context.get("state") is not None:
            at = context["positions"]
            if self.rotary:
                query, key = rotate_pairs(query, at), rotate_pairs(key, at)
            q, k = self._maps(features, query, key)
            k = k if visible is None else jnp.where(visible[..., None, None], k, 0)
            y, state = continue_linear(q, k, value, context["state"])
            y = y.astype(self.dtype).reshape(batch, length, width)
            return state, dense(channels, use_bias=self.out_bias, name="out")(y)
        outs = []
        if cut:
            q, k, v = (t[:, :, :cut] for t in (query, key, value))
            if visible is not None:
                v = jnp.where(visible[:, :, None, None], v, 0)
            if self.rotary:
                at = jnp.arange(length)
                q, k = rotate_pairs(q, at), rotate_pairs(k, at)
            q, k = self._maps(features, q, k)
            outs.append(linear_attention(q, k, v, self.causal).astype(self.dtype))
        if self.local_heads:
            dropping = train and self.attention_dropout > 0
            local = local_attention(
                *(t[:, :, cut:] for t in (query, key, value)),
                window=self.local_window,
                before=1,
                after=1,
                causal=self.causal,
                visible=visible,
                dropout=self.attention_dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
            )
            outs.append(local)
        y = jnp.concatenate(outs, 2).reshape(batch, length, width)
        y = dense(channels, use_bias=self.out_bias, name="out")(y)
        return nn.Dropout(self.attention_dropout)(y, deterministic=not train)

    def _maps(self, features: Array, q: Heads, k: Heads) -> tuple[Features, Features]:
        """The features of queries and keys."""
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        if not self.projected:
            return jax.nn.softmax(q), jnp.exp(k) if self.causal else jax.nn.softmax(k, axis=1)
        if self.generalized:
            rows = features * self.head_dim**-0.25
            return tuple(self.kernel(jnp.einsum("blnd,md->blnm", t, rows)) + 1e-3 for t in (q, k))
        return (
            softmax_features(q, features, is_query=True),
            softmax_features(k, features, is_query=False, strict=self.strict),
        )


def redraw_features(variables: dict, key: Array) -> dict:
    """The same variables with new random features, as the authors take every 1,000 steps.

    They are in the collection `batch_stats`: kept in checkpoints, and never trained.
    """

    def draw(path, leaf):
        if path[-1].key != "features":
            return leaf
        salt = sum(jax.tree_util.keystr(path, simple=True).encode())
        return orthogonal_features(jax.random.fold_in(key, salt), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


class Performer(WholeTexts):
    """Performer language model or encoder.

    `init_state(batch, length)` and `step(state, tokens)` (through `apply(..., method="step")`)
    continue a text. Where `recurrent`, the state has one size; otherwise it is the tokens, and each
    step runs the whole text.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      head_dim: channels of a head; the heads need not add up to embed_dim.
      max_length: longest text.
      features: m, random features of a head; None: int(d ln d).
      causal: a token sees itself and those before it.
      local_heads: heads of local softmax attention instead; one number, or one a layer.
      local_window: tokens of their blocks; a block sees its neighbours, or the one before it.
      generalized: features `kernel(w_r . x~) + 1e-3` in place of exponentials.
      projected: whether there are random features; without them queries are a softmax over
        channels, and keys one over tokens (causal: exp).
      kernel: of the generalized features.
      strict: keys are bounded without a look at other tokens, so that nothing leaks from later
        ones; the reference is not strict.
      position: "rotary" (fixed sines added, rotary in the layers), "axial" or "absolute".
      axial_shape: rows and columns of axial positions; None: of 64 columns.
      norm: "layer", "scale" (one learned length) or "rezero" (none, a learned factor instead).
      gated: whether the MLPs are.
      tie_embeddings: read the logits off the transposed embedding.
      cross_attention: there are 2 `depth` layers, of which every second one attends to a memory.
      shift_tokens: half (causal) or two thirds of the channels come from the tokens beside.
      reversible: two streams, whose sum is read; training keeps the last layer's outputs only, but
        for models with `cross_attention`, whose memory has a gradient, too.
      dropout: rate on the embedding and in the MLPs.
      attention_dropout: rate on what attention adds, and on local weights.
    """

    vocab_size: int = 256
    embed_dim: int = 512
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    max_length: int = 2048
    features_per_head: int | None = None
    causal: bool = False
    local_heads: int | tuple[int, ...] = 0
    local_window: int = 256
    generalized: bool = False
    projected: bool = True
    kernel: Callable[[Array], Array] = jax.nn.relu
    strict: bool = False
    position: str = "rotary"
    axial_shape: tuple[int, int] | None = None
    norm: str = "layer"
    mlp_ratio: int = 4
    gated: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    tie_embeddings: bool = False
    cross_attention: bool = False
    shift_tokens: bool = False
    reversible: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 2048
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
        """Logits at every token; `mask` is 0 or False for padding, whose values count as zero.

        `memory` is what `cross_attention` looks at, such as an encoder's `last_hidden_state`.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, mask, train, memory, memory_mask)["logits"]

    @property
    def recurrent(self) -> bool:
        """Whether a sum is all that a token needs of those before it.

        So it is without local heads and shifts, if no key is bounded by later ones, in layers that
        are not reversible and have norms.
        """
        local = self.local_heads if isinstance(self.local_heads, tuple) else (self.local_heads,)
        alone = self.strict or self.generalized or not self.projected
        plain = not (self.shift_tokens or self.reversible or self.norm == "rezero" or any(local))
        plain = plain and not self.cross_attention
        return self.causal and alone and plain

    def init_state(self, batch: int, length: int) -> dict[str, Any]:
        """The state before the first token.

        Raises:
          ValueError: if the model is not causal, or if `length` is more than it reads.
        """
        self._check_length(length)
        if not self.recurrent:
            return super().init_state(batch, length)
        width = self.features_per_head if self.projected else self.head_dim
        width = width or int(self.head_dim * math.log(self.head_dim))
        sums = jnp.zeros((batch, self.num_heads, width, self.head_dim + 1), jnp.float32)
        return {"position": jnp.zeros(batch, jnp.int32), "layers": (sums,) * self.depth}

    def step(
        self, state: dict[str, Any], tokens: Int[Array, "batch length"], mask: Array | None = None
    ) -> tuple[dict[str, Any], Float[Array, "batch length vocab_size"]]:
        """Continue by one or more tokens: the state after them, and their logits."""
        if not self.recurrent:
            return super().step(state, tokens, mask)
        return decoder.step(self, state, tokens, mask)

    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"] | None = None,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above; no layers if `reversible`)."""
        self._check(tokens, mask)
        check_memory(self, tokens, memory, memory_mask)
        seen = tuple(None if m is None else m != 0 for m in (mask, memory_mask))
        return self._run(tokens, None, train, Context(seen[0]), memory, seen[1])[0]

    @nn.compact
    def _run(
        self,
        tokens: Array,
        state: tuple | None,
        train: bool,
        context: Context,
        memory: Array | None = None,
        memory_visible: Array | None = None,
    ) -> tuple[dict[str, Array], tuple | None]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # As in the reference; beside the sines that are added, training would not see small ones.
        start = nn.initializers.normal(1.0)
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=start, name="embed", **types
        )
        if context.positions is None:
            at = self._positions(tokens.shape[1])
        else:
            table = self._positions(self.max_length)
            at = jnp.take(table, context.positions, axis=0, mode="fill", fill_value=jnp.nan)
        x = embed(tokens) + at.astype(self.dtype)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = constrain(x, "batch", "length", "channels")
        out, after = {"embed": x}, []
        kinds = (False, True) if self.cross_attention else (False,)
        layers = [self._layer(i, cross) for i in range(self.depth) for cross in kinds]
        seen = {"visible": context.mask}
        if self.cross_attention:
            seen |= {"memory": memory, "memory_visible": memory_visible}
        if self.reversible and self.cross_attention:
            streams = [x, x]
            for i, make in enumerate(layers):
                layer = make(name=f"layers_{i}")
                streams[0] = streams[0] + layer.attend(streams[1], seen, train)
                streams[1] = streams[1] + layer.feed(streams[0], seen, train)
            x = sum(streams)
        elif self.reversible:
            x = sum(run_reversible(self, layers, x, x, seen, train))
        else:
            for i, make in enumerate(layers):
                layer = make(name=f"layers_{i}")
                if state is None:
                    x = layer(x, seen, train)
                else:
                    here = {"state": state[i], "positions": context.positions}
                    now, y = layer.attend(x, seen | here, train)
                    x = x + y
                    x = x + layer.feed(x, seen, train)
                    after.append(now)
                out[f"layer{i}"] = x
        x = out["last_hidden_state"] = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        if self.tie_embeddings:
            x = embed.attend(x)
        else:
            x = Dense(self.vocab_size, kernel_init=init, name="head", **types)(x)
        out["logits"] = constrain(x, "batch", "length", "vocab")
        return out, None if state is None else tuple(after)

    def _layer(self, i: int, cross: bool = False) -> Callable[..., nn.Module]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        local = self.local_heads if isinstance(self.local_heads, int) else self.local_heads[i]
        mixer = PerformerAttention(
            self.num_heads,
            self.head_dim,
            self.features_per_head or int(self.head_dim * math.log(self.head_dim)),
            self.causal and not cross,
            0 if cross else local,
            self.local_window,
            self.generalized,
            self.projected,
            self.kernel,
            self.strict,
            self.position == "rotary" and not cross,
            self.qkv_bias,
            self.out_bias,
            self.attention_dropout,
            cross,
            parent=None,
            **types,
        )
        return partial(
            ResidualLayer,
            mixer,
            self.embed_dim,
            self.mlp_ratio,
            self.gated,
            gelu,
            NORMS[self.norm],
            gate_init=1e-3,
            shifts=((0, 1) if self.causal else (-1, 0, 1)) if self.shift_tokens else (),
            masked_shift=True,
            dropout=self.dropout,
            **types,
        )

    def _positions(self, length: int) -> Float[Array, "length channels"]:
        width = self.embed_dim
        if self.position == "rotary":
            return sines_and_cosines(length, width)
        start = nn.initializers.normal(1.0)
        if self.position == "absolute":
            shape = (self.max_length, width)
            return self.param("position_embedding", start, shape, self.param_dtype)[:length]
        rows, columns = self.axial_shape or (-(-self.max_length // 64), 64)
        first = self.param("position_rows", start, (rows, 1, width), self.param_dtype)
        second = self.param("position_columns", start, (1, columns, width), self.param_dtype)
        return (first + second).reshape(rows * columns, width)[:length]

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"This Performer reads at most {self.max_length} tokens, not {length}; cut the "
                "text, or create the model with more max_length."
            )

    def _check(self, tokens: Array, mask: Array | None) -> None:
        check_tokens(self, tokens)
        check_zero_or_one(mask)
        self._check_length(tokens.shape[1])
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"mask has shape {mask.shape}; it should be that of tokens, {tokens.shape}."
            )
        if self.cross_attention and self.shift_tokens:
            raise ValueError("cross_attention=True excludes shift_tokens=True: choose one.")
        for field, known in (("position", ("rotary", "axial", "absolute")), ("norm", NORMS)):
            if getattr(self, field) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {names}.")
        local = self.local_heads
        local = (local,) * self.depth if isinstance(local, int) else local
        if len(local) != self.depth or not all(0 <= n <= self.num_heads for n in local):
            raise ValueError(
                f"local_heads={self.local_heads} should be 0 to {self.num_heads} heads for each of "
                f"{self.depth} layers."
            )


NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "layer": partial(LayerNorm, epsilon=1e-5),
    "scale": ScaleNorm,
    "rezero": None,
}
"""What stands before attention and MLP."""

# ---------------------------------------------------------------------------- checkpoints


def branch_rules(theirs: str, number: int, gate: str) -> list[Rule]:
    """Rules of the norm, or of the factor called `gate`, of one half of a layer."""
    ours = "layers_{i}"
    return [
        *norm_rules(f"{theirs}.norm", f"{ours}/norm{number}"),
        Rule(f"{theirs}.{gate}", f"{ours}/gate{number}"),
    ]


def _layout(attention: str, mlp: str, shifted: str) -> Rules:
    """Rules of one naming of the two halves of a layer; `shifted` stands where tokens shift."""
    ours, inner = "layers_{i}", f"{attention}.fn{shifted}"
    return Rules(
        [
            Rule("token_emb.weight", "embed/embedding"),
            Rule("pos_emb.emb.weight", "position_embedding"),
            Rule("pos_emb.weights_0", "position_rows", squeeze(0)),
            Rule("pos_emb.weights_1", "position_columns", squeeze(0)),
            *branch_rules(attention, 1, "g"),
            Rule(f"{attention}.g", f"{ours}/norm1/gain"),
            *(
                rule
                for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
                for rule in dense_rules(f"{inner}.to_{short}", f"{ours}/attention/{name}")
            ),
            Rule(
                f"{inner}.fast_attention.projection_matrix",
                f"batch_stats/{ours}/attention/features",
            ),
            *branch_rules(mlp, 2, "g"),
            Rule(f"{mlp}.g", f"{ours}/norm2/gain"),
            *mlp_rules(f"{mlp}.fn{shifted}.fn", f"{ours}/mlp"),
            *norm_rules("norm", "norm"),
            *dense_rules("to_out", "head"),
        ],
        derived={
            "pos_emb.emb": lambda m: _table(m, m.embed_dim),
            "layer_pos_emb.emb": lambda m: _table(m, m.head_dim),
            "performer.proj_updater.calls_since_last_redraw": lambda m: np.zeros((), np.int64),
            f"{inner}.local_attn.rel_pos.inv_freq": _frequencies,
        },
        # The same tensors under second names.
        unused=("performer.proj_updater.instance.*",),
        fresh=("head/*",),
    )


def _table(model: Performer, channels: int) -> np.ndarray | None:
    if model.position != "rotary":
        return None
    return np.asarray(sines_and_cosines(model.max_length, channels))


def _frequencies(model: Performer, i: int) -> np.ndarray | None:
    i, cross = divmod(i, 2) if model.cross_attention else (i, 0)
    local = model.local_heads if isinstance(model.local_heads, int) else model.local_heads[i]
    if cross:
        return None
    frequencies, _ = Rotary().frequencies(model.head_dim, np.zeros(1))
    return np.asarray(frequencies) if local else None


_NAMES = {
    "lucidrains": ("performer.net.layers.{i}.0", "performer.net.layers.{i}.1"),
    "lucidrains_reversible": ("performer.net.blocks.{i}.f.net", "performer.net.blocks.{i}.g.net"),
}

LAYOUTS = {
    f"{name}{suffix}": _layout(*halves, shifted)
    for suffix, shifted in (("", ""), ("_shifted", ".fn"))
    for name, halves in _NAMES.items()
}

_COMMON = dict(
    module=Performer,
    task="language_modelling",
    paper="Rethinking Attention with Performers, arXiv 2009.14794",
    code="github.com/lucidrains/performer-pytorch",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    # The examples of the repository we follow.
    "performer_enwik8": Variant(
        fields=dict(max_length=4096, features_per_head=256, causal=True, norm="scale",
                    shift_tokens=True, reversible=True, local_heads=(8, 8, 8, 6, 4, 2)),
        **_COMMON,
    ),
    "performer_512_12": Variant(
        fields=dict(vocab_size=20000, depth=12, features_per_head=256, reversible=True, gated=True,
                    local_heads=4, shift_tokens=True, dropout=0.1, attention_dropout=0.1),
        **_COMMON | dict(task="masked_language_modelling"),
    ),
    # The paper's.
    "performer_imagenet64": Variant(
        fields=dict(max_length=12288, features_per_head=256, causal=True), **_COMMON,
    ),
    "performer_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, head_dim=8, max_length=64,
                    features_per_head=24, causal=True),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
