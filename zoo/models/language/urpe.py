"""URPE: attention with a second table of relative positions, behind the softmax.

Luo, Li, Zheng, Liu, Wang and He, "Your Transformer May Not be as Powerful as You Expect", NeurIPS
2022, arXiv 2205.13401; official code github.com/lsj2408/URPE (MIT), a fork of fairseq, whose
encoder we follow. For one head, with tables b and c of one number a distance:

    out_i = sum_j p_ij c_(j-i) v_j;     p_i = softmax_j(q_i . k_j / sqrt(d) + b_(j-i))

The weights of softmax add up to one, so relative positions b alone cannot tell where a token
stands in a text of equal tokens; c, which starts at 1, can. Rows of p c do not add up to one: c
stands outside of the normaliser. Both tables are shared by all layers. A distance has a row of its
own (`unique`), or a bucket that grows with the logarithm of the distance.

    x = LN(E[token] (+ P[position])), zero at padding
    x = LN(x + attention(x));   x = LN(x + W2 gelu(W1 x + b1) + b2)

    features            urpe_synthetic
    embed               128  768    for 128 tokens
    layer0              128  768    up to layer2
    last_hidden_state   128  768    the last of them
    logits              128  1000
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, Transform, dense_rules, norm_rules, tied
from zoo.layers.causal import check_tokens
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.models.language.bert import ACTIVATIONS, MaskedLMHead
from zoo.system import System, Variant

init = nn.initializers.normal(0.02)

Heads = Float[Array, "batch length heads head_dim"]
BLOCK_SCORES = 1 << 22
"""Scores of all heads that are formed at once."""


def unique_buckets(length: int) -> Int[np.ndarray, "length length"]:
    """A row of its own for each distance: key minus query, plus `length - 1`."""
    at = np.arange(length)
    return at[None] - at[:, None] + length - 1


def log_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "length length"]:
    """Buckets of distances: exact ones near zero, then ever wider ones up to `max_distance`."""
    at = np.arange(length)
    offset = at[None] - at[:, None]
    half = buckets // 2
    exact = half // 2
    away = np.abs(offset)
    with np.errstate(divide="ignore"):
        ratio = np.log(away.astype(np.float32) / np.float32(exact))
    wide = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    wide = exact + np.where(away < exact, 0, wide).astype(np.int64)
    found = np.where(away < exact, away, np.minimum(wide, half - 1)) * np.sign(offset)
    found = found + 2 * (found >= 0)
    return found - found.min()


def table_rows(length: int, buckets: int, unique: bool) -> int:
    """Rows of a table of relative positions."""
    return 2 * length - 1 if unique else buckets + 1


def urpe_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Float[Array, "heads queries keys"] | None = None,
    factor: Float[Array, "heads queries keys"] | None = None,
    visible: Bool[Array, "batch keys"] | None = None,
    causal: bool = False,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Heads:
    """`sum_j softmax_j(q_i.k_j / sqrt d + bias_ij) factor_ij v_j`, a block of queries at a time.

    The weights of a block are formed again in the backward pass, so that memory is linear in the
    length but for the tables. The kernels have no factor behind the softmax.
    """
    batch, length, heads, head_dim = query.shape
    query = query * head_dim**-0.5
    texts = batch if isinstance(batch, int) else 16  # exported for any batch: a guess
    blocks: list[tuple[int, int | None]] = [(0, None)]  # exported for any length: one
    if isinstance(length, int):
        size = max(1, min(length, BLOCK_SCORES // (texts * heads * key.shape[1])))
        blocks = [(s, min(s + size, length)) for s in range(0, length, size)]
    at = jnp.arange(key.shape[1])

    @partial(jax.checkpoint, static_argnums=(0, 1))
    def block(start, stop, query, key, value, bias, factor):
        rows = slice(start, stop)
        scores = jnp.einsum("bqnd,bknd->bnqk", query[:, rows], key).astype(jnp.float32)
        if bias is not None:
            scores = scores + bias[:, rows]
        if visible is not None:
            scores = jnp.where(visible[:, None, None], scores, -1e30)
        if causal:
            here = start + jnp.arange(scores.shape[2])
            scores = jnp.where(at <= here[:, None], scores, -1e30)
        weights = jax.nn.softmax(scores, -1)
        if factor is not None:
            weights = weights * factor[:, rows]
        return jnp.einsum("bnqk,bknd->bqnd", drop(weights.astype(value.dtype)), value)

    parts = [block(*place, query, key, value, bias, factor) for place in blocks]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


class UrpeAttention(nn.Module):
    """Attention with both tables, and its maps."""

    num_heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        bias: Float[Array, "heads length length"] | None,
        factor: Float[Array, "heads length length"] | None,
        visible: Bool[Array, "batch length"],
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """Attend; `visible` is False at padding."""
        channels = x.shape[-1]
        heads = (*x.shape[:2], self.num_heads, channels // self.num_heads)
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        query, key, value = (
            constrain(
                dense(channels, name=name)(x).reshape(heads),
                "batch", "length", "heads", "head_dim",
            )
            for name in ("query", "key", "value")
        )  # fmt: skip
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = urpe_attention(query, key, value, bias, factor, visible, drop=drop)
        return dense(channels, name="out")(y.reshape(x.shape))


class UrpeLayer(nn.Module):
    """Attention and MLP, each with a LayerNorm behind its residual sum."""

    num_heads: int
    mlp_dim: int
    activation: Callable[[Array], Array]
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, bias, factor, visible, train=False):
        """The tokens after both; arguments as those of `UrpeAttention`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = UrpeAttention(self.num_heads, self.attention_dropout, name="attention", **types)
        x = norm(name="norm1")(x + drop(attention(x, bias, factor, visible, train)))
        mlp = Mlp(self.mlp_dim, self.activation, kernel_init=init, name="mlp", **types)
        x = norm(name="norm2")(x + drop(mlp(x)))
        return constrain(x, "batch", "length", "channels")


class Urpe(Model):
    """The encoder of the authors' synthetic tasks, with or without a word head.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      max_length: longest text.
      pad_token: number of the padding word; a mask hides more.
      num_segments: rows of the table of segments; 0: none.
      use_positions: whether learned absolute positions are added.
      embed_norm: a LayerNorm behind the embedding.
      embed_scale: factor on the embedded words; None: 1.
      relative: whether b is there.
      unique: whether each distance has a row of b; else `buckets`, up to `max_distance`.
      universal: whether c is there, with `factor_unique`, `factor_buckets` and
        `factor_max_distance`.
      head: None or "language_model".
      dropout: rate on the embedding and both branches.
      attention_dropout: rate on the weights.
    """

    vocab_size: int = 1000
    embed_dim: int = 768
    depth: int = 3
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 128
    pad_token: int = 1
    num_segments: int = 0
    use_positions: bool = False
    embed_norm: bool = True
    embed_scale: float | None = None
    activation: str = "gelu"
    relative: bool = True
    unique: bool = True
    buckets: int = 64
    max_distance: int = 128
    universal: bool = True
    factor_unique: bool = True
    factor_buckets: int = 64
    factor_max_distance: int = 128
    head: str | None = "language_model"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, min(length, self.max_length)), jnp.int32)
        return {"tokens": shape} | ({"segments": shape} if self.num_segments else {})

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None = None,
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Array:
        """Logits at every token; without a head, the last hidden states.

        Args:
          tokens: numbers of words.
          segments: segment of each token; None: none is added.
          mask: 0 or False for padding, beside `pad_token`.
          positions: rows of the absolute positions; None: counted over what is no padding.
          train: whether to drop out.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, segments, mask, positions, train)["logits"]

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None = None,
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); arguments as those of `__call__`."""
        tokens, mask = check_tokens(self, tokens, mask, positions)
        length = tokens.shape[1]
        self._check(length)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        visible = tokens != self.pad_token
        visible = visible if mask is None else visible & mask
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        x = embed(tokens) * (1.0 if self.embed_scale is None else self.embed_scale)
        if self.use_positions:
            if positions is None:
                real = (tokens != self.pad_token).astype(jnp.int32)
                positions = jnp.cumsum(real, 1) * real + self.pad_token
            x = x + self._rows(
                "position_embedding", self.max_length + self.pad_token + 1, positions
            )
        if self.num_segments and (segments is not None or self.is_initializing()):
            segments = jnp.zeros_like(tokens) if segments is None else segments
            x = x + self._rows("segment_embedding", self.num_segments, segments)
        if self.embed_norm:
            x = LayerNorm(epsilon=1e-5, name="embed_norm", **types)(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = jnp.where(visible[:, :, None], x, 0)
        out = {"embed": constrain(x, "batch", "length", "channels")}
        bias, factor = self._tables(length)
        for i in range(self.depth):
            x = out[f"layer{i}"] = UrpeLayer(
                self.num_heads, self.mlp_dim, ACTIVATIONS[self.activation], self.dropout,
                self.attention_dropout, name=f"layers_{i}", **types,
            )(x, bias, factor, visible, train)  # fmt: skip
        out["last_hidden_state"] = out["logits"] = x
        if self.head is not None:
            head = MaskedLMHead(
                self.vocab_size,
                activation=ACTIVATIONS[self.activation],
                epsilon=1e-5,
                name="predictions",
                **types,
            )
            out["logits"] = head(x, embed.attend)
        return out

    def bucket_tables(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which rows of b and of c belong to each pair of a query and a key."""

        def table(there, unique, buckets, distance):
            if not there:
                return None
            if unique:
                return unique_buckets(self.max_length)
            return log_buckets(self.max_length, buckets, distance)

        return (
            table(self.relative, self.unique, self.buckets, self.max_distance),
            table(
                self.universal, self.factor_unique, self.factor_buckets, self.factor_max_distance
            ),
        )

    def _tables(self, length: int) -> tuple[Array | None, Array | None]:
        found = []
        for name, start, at, rows in zip(
            ("relative_bias", "relative_factor"),
            (init, nn.initializers.ones),
            self.bucket_tables(),
            (
                table_rows(self.max_length, self.buckets, self.unique),
                table_rows(self.max_length, self.factor_buckets, self.factor_unique),
            ),
            strict=True,
        ):
            if at is None:
                found.append(None)
                continue
            table = self.param(name, start, (rows, self.num_heads), self.param_dtype)
            if isinstance(length, int):
                at = at[:length, :length]
            else:  # a symbolic length is known when the program runs
                here = jnp.arange(length)
                at = jnp.asarray(at)[here[:, None], here]
            each = table.astype(jnp.float32)[at]
            found.append(jnp.moveaxis(each, 2, 0))
        return tuple(found)

    def _rows(self, name: str, rows: int, index: Array) -> Array:
        table = self.param(name, init, (rows, self.embed_dim), self.param_dtype)
        return jnp.take(table.astype(self.dtype), index, axis=0, mode="fill", fill_value=jnp.nan)

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"This Urpe reads at most {self.max_length} tokens, not {length}; cut the text, or "
                "create the model with more max_length."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {self.embed_dim} channels; choose a "
                "divisor."
            )
        for field, known in (
            ("activation", tuple(ACTIVATIONS)),
            ("head", (None, "language_model")),
        ):
            if getattr(self, field) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {names}.")


def _layout(prefix: str = "") -> Rules:
    """Rules of one published naming; `prefix` is empty in a file of the encoder alone."""
    theirs, ours = f"{prefix}layers.{{i}}", "layers_{i}"
    words = f"{prefix}embed_tokens.weight"
    heads = [
        # In one rule, so that the embedding has its second name only beside a head.
        Rule(
            (words, "encoder.lm_head.bias", "encoder.lm_head.weight"),
            ("embed/embedding", "predictions/bias"),
            Transform(lambda xs: [*tied.forward([xs[0], xs[2]]), xs[1]], lambda xs: [*xs, xs[0]]),
        ),
        *dense_rules("encoder.lm_head.dense", "predictions/transform"),
        *norm_rules("encoder.lm_head.layer_norm", "predictions/norm"),
    ]
    encoder = [
        Rule(words, "embed/embedding"),
        Rule(f"{prefix}embed_positions.weight", "position_embedding"),
        Rule(f"{prefix}segment_embeddings.weight", "segment_embedding"),
        *norm_rules(f"{prefix}emb_layer_norm", "embed_norm"),
        *(
            rule
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
            for rule in dense_rules(f"{theirs}.self_attn.{short}_proj", f"{ours}/attention/{name}")
        ),
        *norm_rules(f"{theirs}.self_attn_layer_norm", f"{ours}/norm1"),
        *dense_rules(f"{theirs}.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.fc2", f"{ours}/mlp/down"),
        *norm_rules(f"{theirs}.final_layer_norm", f"{ours}/norm2"),
        Rule(f"{prefix}rp_bias.weight", "relative_bias"),
        Rule(f"{prefix}ur_rp_bias.weight", "relative_factor"),
    ]
    return Rules((*heads, *encoder) if prefix else encoder, fresh=("predictions/*",))


LAYOUTS = {
    "official": _layout("encoder.sentence_encoder."),
    "encoder": _layout(),
}

PARTITION = {r"relative_(bias|factor)": (None, "heads")}

_COMMON = dict(
    module=Urpe,
    task="masked_language_modelling",
    paper="Your Transformer May Not be as Powerful as You Expect, arXiv 2205.13401",
    code="github.com/lsj2408/URPE",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "urpe_synthetic": Variant(
        fields={}, metric="about 100 % of even tokens and of positions (paper)", **_COMMON,
    ),
    "urpe_synthetic_rpe_only": Variant(fields=dict(universal=False), **_COMMON),
    "urpe_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, mlp_dim=64, max_length=64),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION, no_decay=("relative_factor",)
)
