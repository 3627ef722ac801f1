"""Reformer: attention inside buckets of similar tokens, and layers that run backwards.

Kitaev, Kaiser and Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, arXiv 2001.04451;
official code github.com/google/trax (Apache-2.0). We follow Hugging Face's transformers, which has
the published weights. Layers are of two kinds, by a list:

    lsh     k_i = q_i / rms(q_i) / sqrt(d), one map for queries and keys. A round hashes each token
            to the nearest of b random directions, sorts by (bucket, position), cuts the sorted
            tokens into chunks, and lets a chunk attend to itself and its neighbours:
            o_i^r = sum_j exp(q_i.k_j - lse_i^r) v_j;   o_i = sum_r softmax_r(lse_i^r) o_i^r
            A token attends to itself only if it sees no other (its own score is -1e5).
    local   chunks of the text, each with its neighbours, with a map for keys.

Chunks at an end are neighbours of those at the other; causal and padding masks go by positions. The
paper lets only tokens of one bucket see each other, the code all of a chunk; `same_bucket=True` is
the paper's. Sorting is by all tokens, so a causal model is causal in its weights, yet later tokens
move the borders of chunks. Two streams run through reversible layers (`zoo.layers.reversible`):

    y1 = x1 + attention(LN(x2));   y2 = x2 + W2 relu(W1 LN(y1));   logits = W LN([y1, y2]) + b

Axial positions add `[A[p // n], B[p % n]]`. Random directions are drawn from the stream `sample`
while training, otherwise from `hash_seed`, or they are given.

    features            reformer_crime_and_punishment
    embed               2048  256    for 2,048 tokens
    last_hidden_state   2048  512    both streams behind the last LayerNorm
    logits              2048  320
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules
from zoo.layers.causal import check_tokens
from zoo.layers.decoder import WholeTexts
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.reversible import run_reversible
from zoo.models.language.bert import ACTIVATIONS
from zoo.system import File, System, Variant

init = nn.initializers.normal(0.02)

MASKED, SELF = -1e9, -1e5
"""Scores of what is not seen, and of a token's own key under a shared map."""

Heads = Float[Array, "batch heads length head_dim"]


def num_buckets_for(length: int, chunk: int, max_positions: int) -> tuple[int, ...]:
    """How many buckets, in one or two factors, where a configuration does not say."""
    power = (2 * (length // chunk)).bit_length() - 1
    limit = 2 * max(int((max_positions // chunk) ** 0.5), chunk)
    if 2**power <= limit:
        return (2**power,)
    return (2 ** (power // 2), 2 ** (power - power // 2))


def buckets_of(
    vectors: Heads,
    rotations: Float[Array, "heads head_dim rounds directions"],
    factors: tuple[int, ...],
) -> Int[Array, "batch heads rounds length"]:
    """The bucket of each vector in each round: the nearest of `+-rotations`, factor by factor."""
    rotated = jnp.einsum("bhtd,hdnr->bhntr", vectors, rotations)
    buckets, start, below = 0, 0, 1
    for factor in factors:
        part = rotated[..., start : start + factor // 2]
        nearest = jnp.argmax(jnp.concatenate([part, -part], -1), -1)
        buckets, start, below = buckets + below * nearest, start + factor // 2, below * factor
    return buckets


def look_adjacent(x: Array, before: int, after: int) -> Array:
    """Chunks `[batch heads chunks size ...]`, each with its neighbours, in a ring."""
    return jnp.concatenate([jnp.roll(x, -i, 2) for i in range(-before, after + 1)], axis=3)


def attend(
    query: Float[Array, "batch heads chunks queries head_dim"],
    key: Float[Array, "batch heads chunks keys head_dim"],
    value: Float[Array, "batch heads chunks keys head_dim"],
    seen: Bool[Array, "#batch #heads chunks queries keys"],
    itself: Bool[Array, "#batch #heads chunks queries keys"] | None = None,
    drop: nn.Module | None = None,
) -> tuple[Array, Float[Array, "batch heads chunks queries"]]:
    """Softmax attention inside chunks, and its log-sum-exp.

    The scores of a chunk are small, so they stand in memory; `itself` marks a token's own key.
    """
    scores = jnp.einsum("bhcqd,bhckd->bhcqk", query, key).astype(jnp.float32)
    scores = jnp.where(seen, scores, MASKED)
    if itself is not None:
        scores = jnp.where(itself, SELF, scores)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(value.dtype)
    weights = weights if drop is None else drop(weights)
    return jnp.einsum("bhcqk,bhckd->bhcqd", weights, value), lse


def visibility(
    q_at: Int[Array, "... queries"],
    k_at: Int[Array, "... keys"],
    visible: Bool[Array, "... keys"] | None,
    causal: bool,
) -> Bool[Array, "... queries keys"]:
    """Which keys a query may see, by their positions in the text and by padding."""
    seen = jnp.ones((*q_at.shape, k_at.shape[-1]), bool)
    if causal:
        seen = q_at[..., :, None] >= k_at[..., None, :]
    return seen if visible is None else seen & visible[..., None, :]


class ReformerAttention(nn.Module):
    """One layer's attention, of either kind.

    Attributes:
      kind: "lsh" or "local".
      num_heads: heads.
      head_dim: channels of a head; the heads need not add up to the channels.
      chunk: tokens of a chunk.
      before: chunks before its own that a token sees.
      after: chunks behind it.
      causal: whether tokens see only what stands before them in the text.
      buckets: factors of the number of buckets.
      same_bucket: whether only tokens of one bucket see each other (lsh).
      dropout: rate on the weights.
    """

    kind: str
    num_heads: int
    head_dim: int
    chunk: int
    before: int = 1
    after: int = 0
    causal: bool = False
    buckets: tuple[int, ...] = (2,)
    same_bucket: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch length"] | None,
        rotations: Float[Array, "heads head_dim rounds directions"] | None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """Attend; the length is a multiple of `chunk`, or not above it."""
        batch, length, channels = x.shape
        dense = partial(
            Dense, use_bias=False, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype
        )

        def project(name: str) -> Heads:
            y = dense(self.num_heads * self.head_dim, name=name)(x)
            y = y.reshape(batch, length, self.num_heads, self.head_dim)
            return constrain(y, "batch", "length", "heads", "head_dim").swapaxes(1, 2)

        drop = nn.Dropout(self.dropout, deterministic=not train)
        if self.kind == "local":
            query, key, value = project("query"), project("key"), project("value")
            y = self._local(query, key * self.head_dim**-0.5, value, visible, drop)
        else:
            y = self._lsh(project("query_key"), project("value"), visible, rotations, drop)
        y = y.swapaxes(1, 2).reshape(batch, length, -1)
        return dense(channels, name="out")(y)

    def _chunks(self, x: Array) -> Array:
        size = min(self.chunk, x.shape[2])
        return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])

    def _around(self, x: Array) -> Array:
        """Chunks with their neighbours; a text of one chunk has none."""
        return look_adjacent(x, self.before, self.after) if x.shape[2] > 1 else x

    def _local(self, query, key, value, visible, drop) -> Heads:
        at = self._chunks(jnp.arange(query.shape[2])[None, None])
        keep = None if visible is None else self._around(self._chunks(visible[:, None]))
        seen = visibility(at, self._around(at), keep, self.causal)
        key, value = (self._around(self._chunks(t)) for t in (key, value))
        y, _ = attend(self._chunks(query), key, value, seen, drop=drop)
        return y.reshape(query.shape)

    def _lsh(self, query_key, value, visible, rotations, drop) -> Heads:
        length = query_key.shape[2]
        at = jnp.arange(length)[None, None]
        if length <= self.chunk:
            rounds, order, undo = 1, None, None
            visible = None if visible is None else visible[:, None]
            group = None
        else:
            rounds = rotations.shape[2]
            group = buckets_of(jax.lax.stop_gradient(query_key), rotations, self.buckets)
            count = math.prod(self.buckets)
            if visible is not None:  # padding has a bucket of its own, the last
                group = jnp.where(visible[:, None, None], group, count)
            group = group + (count + 1) * jnp.arange(rounds)[:, None]
            group = group.reshape(*group.shape[:2], -1)
            order = jnp.argsort(group, axis=-1, stable=True)
            undo = jnp.argsort(order, axis=-1)
            at = order % length
            query_key = jnp.take_along_axis(query_key, at[..., None], 2)
            value = jnp.take_along_axis(value, at[..., None], 2)
            if visible is not None:
                visible = jnp.take_along_axis(visible[:, None], at, 2)
        at = self._chunks(at)
        near = self._around(at)
        keep = None if visible is None else self._around(self._chunks(visible))
        seen = visibility(at, near, keep, self.causal)
        if self.same_bucket and group is not None:
            group = self._chunks(jnp.take_along_axis(group, order, 2))
            seen &= group[..., :, None] == self._around(group)[..., None, :]
        square = jnp.mean(jnp.square(query_key.astype(jnp.float32)), -1, keepdims=True)
        key = query_key * jax.lax.rsqrt(square + 1e-6) * self.head_dim**-0.5
        key, near_value = (self._around(self._chunks(t.astype(self.dtype))) for t in (key, value))
        itself = at[..., :, None] == near[..., None, :]
        y, lse = attend(self._chunks(query_key), key, near_value, seen, itself, drop)
        y = y.reshape(query_key.shape)
        if order is None:
            return y
        y = jnp.take_along_axis(y, undo[..., None], 2)
        lse = jnp.take_along_axis(lse.reshape(order.shape), undo, 2)
        y = y.reshape(*y.shape[:2], rounds, length, -1)
        # Not a softmax: near -1e5 the log-sum-exp is rounded by 0.004, as in the published code.
        lse = lse.reshape(*lse.shape[:2], rounds, length)
        share = jnp.exp(lse - jax.nn.logsumexp(lse, axis=2, keepdims=True))
        return (y * share[..., None].astype(y.dtype)).sum(2)


class ReformerLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm; what either adds to its stream.

    The context is `(visible, rotations)`, with the directions of layer `index`, or None.
    """

    mixer: ReformerAttention  # a template: its copy is the parameter group `attention`
    index: int
    mlp_dim: int
    activation: str = "relu"
    epsilon: float = 1e-12
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Its parts."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.norm1 = LayerNorm(epsilon=self.epsilon, **types)
        self.norm2 = LayerNorm(epsilon=self.epsilon, **types)
        self.attention = self.mixer.clone()
        self.mlp = Mlp(
            self.mlp_dim, ACTIVATIONS[self.activation], self.dropout, kernel_init=init, **types
        )
        self.drop = nn.Dropout(self.dropout)

    def attend(self, x: Array, context: tuple, train: bool = False) -> Array:
        """What attention adds."""
        visible, rotations = context
        y = self.attention(self.norm1(x), visible, rotations[self.index], train)
        return self.drop(y, deterministic=not train)

    def feed(self, x: Array, context: tuple, train: bool = False) -> Array:
        """What the MLP adds."""
        return self.mlp(self.norm2(x), train)


class Reformer(WholeTexts):
    """Reformer, with or without a head.

    With a word head, `init_state(batch, length)` and `step(state, tokens)` run the whole text at
    every step, as the borders of chunks depend on all tokens.

    Attributes:
      attention: "local" or "lsh" for each layer.
      head_dim: channels of a head.
      causal: whether tokens see only those before them.
      position: "axial" or "absolute".
      axial_shape: rows and columns of axial positions.
      axial_dims: channels of both parts; they add up to embed_dim.
      max_positions: longest text.
      num_hashes: rounds of hashing.
      num_buckets: buckets, even, or their factors; None: about two for each chunk of the text.
      lsh_chunk: tokens of a chunk; `lsh_before` and `lsh_after`: neighbours that it sees.
      local_chunk: the same of local layers, with `local_before` and `local_after`.
      same_bucket: see the module.
      hash_seed: of the random directions without the stream `sample`.
      pad_token: fills a text up to whole chunks; it is hidden from all.
      head: None, "language_model" (also for masked words), "classification" or
        "question_answering".
      num_classes: of the classification head.
      dropout: rate on embeddings, both branches and the last norm's output.
      attention_dropout: rate on the weights.
    """

    vocab_size: int = 320
    embed_dim: int = 256
    attention: tuple[str, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    num_heads: int = 2
    head_dim: int = 64
    mlp_dim: int = 512
    activation: str = "relu"
    epsilon: float = 1e-12
    causal: bool = True
    position: str = "axial"
    axial_shape: tuple[int, int] = (512, 1024)
    axial_dims: tuple[int, int] = (64, 192)
    max_positions: int = 524288
    num_hashes: int = 1
    num_buckets: int | tuple[int, ...] | None = None
    lsh_chunk: int = 64
    lsh_before: int = 1
    lsh_after: int = 0
    local_chunk: int = 64
    local_before: int = 1
    local_after: int = 0
    same_bucket: bool = False
    hash_seed: int = 0
    pad_token: int = 0
    head: str | None = "language_model"
    num_classes: int = 2
    dropout: float = 0.05
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 2048
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        length = min(length, self._room())
        if self.padded(length) > self._room():
            chunks, whole = self._chunks()
            length = max(length // whole * whole, min(*chunks, length))
        shape = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        return {"tokens": shape, "mask": shape}

    def any_length(self) -> tuple[int, int]:
        """The size of the blocks, and how few of them, that one exported program takes.

        Raises:
          ValueError: if the operations depend on the length.
        """
        if "lsh" in self.attention and self.num_buckets is None:
            raise ValueError(
                "This Reformer takes its number of buckets from the length; create it with "
                "num_buckets=N, or give the length (--length N)."
            )
        return self._chunks()[1], 2

    def init_state(self, batch: int, length: int) -> dict[str, Array]:
        """The state before the first token, with room for `length` tokens.

        Raises:
          ValueError: if the model is not causal, has no word head, or has too few positions.
        """
        if self.head != "language_model":
            raise ValueError(
                f"This Reformer has head={self.head!r} and says no words; create it with "
                "head='language_model'."
            )
        self._check(length)
        return super().init_state(batch, length)

    def _room(self) -> int:
        """Tokens of the longest text, filled up."""
        table = math.prod(self.axial_shape) if self.position == "axial" else self.max_positions
        return min(table, self.max_positions)

    def _chunks(self) -> tuple[list[int], int]:
        """The sizes of chunks, and what all of them divide."""
        sizes = {"lsh": self.lsh_chunk, "local": self.local_chunk}
        chunks = [size for kind, size in sizes.items() if kind in self.attention]
        return chunks, math.lcm(*chunks)

    def padded(self, length: int) -> int:
        """The length that a text of `length` tokens is filled up to."""
        chunks, whole = self._chunks()
        return length if length <= min(chunks) else -(-length // whole) * whole

    def factors(self, length: int) -> tuple[int, ...]:
        """The factors of the number of buckets for a text of (padded) `length`."""
        if self.num_buckets is None:
            return num_buckets_for(max(length, self.lsh_chunk), self.lsh_chunk, self.max_positions)
        return (self.num_buckets,) if isinstance(self.num_buckets, int) else self.num_buckets

    def rotation_shape(self, length: int) -> tuple[int, int, int, int]:
        """Shape of one layer's random directions for a text of `length` tokens."""
        directions = sum(self.factors(self.padded(length))) // 2
        return (self.num_heads, self.head_dim, self.num_hashes, directions)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        rotations: list[Array] | None = None,
        train: bool = False,
    ) -> Array:
        """What the head gives; without one, the last hidden states.

        Args:
          tokens: numbers of words.
          mask: 0 or False for padding; None is no padding.
          positions: of the tokens in their texts; None: 0, 1, ...
          rotations: random directions of each lsh layer, in order, as `rotation_shape` says.
          train: whether to drop out.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, mask, positions, rotations, train)["logits"]

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        rotations: list[Array] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); arguments as those of `__call__`."""
        tokens, mask = check_tokens(self, tokens, mask, positions)
        length = tokens.shape[1]
        self._check(length)
        total = self.padded(length)
        if total > length:
            mask = jnp.ones(tokens.shape, bool) if mask is None else mask
            widths = ((0, 0), (0, total - length))
            tokens = jnp.pad(tokens, widths, constant_values=self.pad_token)
            mask = jnp.pad(mask, widths)
        at = jnp.arange(total)[None]
        if positions is not None:
            batch = tokens.shape[0]
            at = jnp.concatenate([jnp.broadcast_to(positions, (batch, length)),
                                  jnp.broadcast_to(at[:, length:], (batch, total - length))],
                                 axis=1)  # fmt: skip
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        x = drop(embed(tokens)) + drop(self._positions(at))
        x = constrain(x, "batch", "length", "channels")
        out = {"embed": x[:, :length]}
        context = (mask, self._rotations(total, rotations))
        layers = [self._layer(i, total) for i in range(len(self.attention))]
        x = jnp.concatenate(run_reversible(self, layers, x, x, context, train), -1)
        x = drop(LayerNorm(epsilon=self.epsilon, name="norm", **types)(x))[:, :length]
        out["last_hidden_state"] = out["logits"] = x
        if self.head is not None:
            out["logits"] = self._read(x, drop)
        return out

    def _layer(self, i: int, length: int) -> partial:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kind = self.attention[i]
        mixer = ReformerAttention(
            kind,
            self.num_heads,
            self.head_dim,
            *(getattr(self, f"{kind}_{name}") for name in ("chunk", "before", "after")),
            self.causal,
            self.factors(length),
            self.same_bucket,
            self.attention_dropout,
            parent=None,
            **types,
        )
        return partial(
            ReformerLayer, mixer, i, self.mlp_dim, self.activation, self.epsilon, self.dropout,
            **types,
        )  # fmt: skip

    def _rotations(self, length: int, given: list[Array] | None) -> tuple[Array | None, ...]:
        """For each layer its random directions, None for those that are local."""
        if self.has_rng("sample"):
            key = self.make_rng("sample")
        else:
            key = jax.random.key(self.hash_seed)
        shape, every = self.rotation_shape(length), []
        for i, kind in enumerate(self.attention):
            if kind == "local":
                every.append(None)
            elif given is not None:
                found = given[sum(r is not None for r in every)]
                if found.shape != shape:
                    raise ValueError(f"rotations have shape {found.shape}; expected {shape}.")
                every.append(found)
            else:
                every.append(jax.random.normal(jax.random.fold_in(key, i), shape))
        return tuple(every)

    def _positions(self, at: Int[Array, "#batch length"]) -> Array:
        if self.position == "absolute":
            shape = (self.max_positions, self.embed_dim)
            table = self.param("position_embedding", init, shape, self.param_dtype)
            return table.astype(self.dtype)[at]
        rows, columns = self.axial_shape
        first, second = self.axial_dims
        start = nn.initializers.normal(1.0)
        one = self.param("position_rows", start, (rows, 1, first), self.param_dtype)
        two = self.param("position_columns", start, (1, columns, second), self.param_dtype)
        parts = [one[at // columns, 0], two[0, at % columns]]
        return jnp.concatenate(parts, -1).astype(self.dtype)

    def _read(self, x: Array, drop: nn.Module) -> Array:
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.head == "question_answering":
            return dense(2, name="span_head")(x)
        if self.head == "classification":
            x = jnp.tanh(dense(self.embed_dim, name="head_transform")(drop(x[:, 0])))
            return dense(self.num_classes, name="class_head")(drop(x))
        # Published files hold a second bias, which nothing reads.
        self.param("spare_bias", nn.initializers.zeros, (self.vocab_size,), self.param_dtype)
        return constrain(dense(self.vocab_size, name="head")(x), "batch", "length", "vocab")

    def _check(self, length: int) -> None:
        for field, values, known in (
            ("attention", self.attention, ("local", "lsh")),
            ("position", (self.position,), ("axial", "absolute")),
            ("head", (self.head,), HEADS),
            ("activation", (self.activation,), tuple(ACTIVATIONS)),
        ):
            wrong = [v for v in values if v not in known]
            if wrong:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{field}: {wrong[0]!r} is none of {names}.")
        room = self._room()
        if self.padded(length) > room:
            raise ValueError(
                f"This Reformer has {room} positions, too few for {length} tokens filled up to "
                f"{self.padded(length)}, whole chunks; cut the text, or create the model with more."
            )
        if self.position == "axial" and sum(self.axial_dims) != self.embed_dim:
            raise ValueError(
                f"axial_dims={self.axial_dims} should add up to embed_dim={self.embed_dim}."
            )
        if any(f % 2 or f < 2 for f in self.factors(self.padded(length))):
            raise ValueError(f"num_buckets={self.num_buckets} should be even: directions and back.")


HEADS = (None, "language_model", "classification", "question_answering")

# ---------------------------------------------------------------------------- checkpoints


def _layout(prefix: str = "") -> Rules:
    """Rules of one published naming; `prefix` is empty in a file of the encoder alone."""
    theirs, ours = f"{prefix}encoder.layers.{{i}}", "layers_{i}"
    inner = f"{theirs}.attention.self_attention"
    positions = f"{prefix}embeddings.position_embeddings"
    heads = [
        *dense_rules("lm_head.decoder", "head"),
        Rule("lm_head.bias", "spare_bias"),
        *dense_rules("classifier.dense", "head_transform"),
        *dense_rules("classifier.out_proj", "class_head"),
        *dense_rules("qa_outputs", "span_head"),
    ]
    encoder = [
        Rule(f"{prefix}embeddings.word_embeddings.weight", "embed/embedding"),
        Rule(f"{positions}.weights.0", "position_rows"),
        Rule(f"{positions}.weights.1", "position_columns"),
        Rule(f"{positions}.embedding.weight", "position_embedding"),
        *norm_rules(f"{theirs}.attention.layer_norm", f"{ours}/norm1"),
        *(
            rule
            for name in ("query_key", "query", "key", "value")
            for rule in dense_rules(f"{inner}.{name}", f"{ours}/attention/{name}")
        ),
        *dense_rules(f"{theirs}.attention.output.dense", f"{ours}/attention/out"),
        *norm_rules(f"{theirs}.feed_forward.layer_norm", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.feed_forward.dense.dense", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.feed_forward.output.dense", f"{ours}/mlp/down"),
        *norm_rules(f"{prefix}encoder.layer_norm", "norm"),
    ]
    masks = ("self_mask_value_float16", "self_mask_value_float32", "mask_value_float16",
             "mask_value_float32")  # fmt: skip
    return Rules(
        (*heads, *encoder) if prefix else encoder,
        derived={f"{inner}.{name}": None for name in masks},
        unused=("lm_head.*", "classifier.*", "qa_outputs.*") if prefix else (),
        fresh=("*head/*", "head_transform/*"),
    )


LAYOUTS = {
    "huggingface": _layout("reformer."),
    "huggingface_encoder": _layout(),
}

# ------------------------------------------------------------------------------- variants

PARTITION = {
    r".*attention/query_key/kernel": ("channels", "heads"),
    r"position_(rows|columns)": (None, None, None),
}

_COMMON = dict(
    module=Reformer,
    task="language_modelling",
    paper="Reformer, arXiv 2001.04451",
    code="github.com/google/trax",
    licence="Apache-2.0",
)
_ENWIK8 = dict(
    vocab_size=258, embed_dim=1024, num_heads=8, head_dim=128, mlp_dim=4096, num_hashes=4,
    attention=("local", "local", "lsh", "local", "local", "local", "lsh", "local", "local", "local",
               "lsh", "local"),
    axial_shape=(128, 512), axial_dims=(256, 768), max_positions=65536, lsh_chunk=256,
    local_chunk=128, num_buckets=512, dropout=0.2, attention_dropout=0.1,
)  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "reformer_crime_and_punishment": Variant(
        fields=dict(num_buckets=(64, 128)), files=(File("pytorch_model.bin"),), **_COMMON,
    ),
    "reformer_enwik8": Variant(
        fields=_ENWIK8, files=(File("pytorch_model.bin"),),
        metric="enwik8 1.05 bits a byte (paper, 12 layers)", **_COMMON,
    ),
    "reformer_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, attention=("local", "lsh"), num_heads=4,
                    head_dim=8, mlp_dim=64, axial_shape=(8, 8), axial_dims=(12, 20),
                    max_positions=64, num_buckets=4, num_hashes=2, lsh_chunk=8, local_chunk=8,
                    dropout=0.0),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION, frozen=("spare_bias",))
