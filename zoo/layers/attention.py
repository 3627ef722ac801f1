"""Multi-head attention: projections around `kernels_pallas.attention`."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import kernels_pallas
from zoo.layers.dense import Dense
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain


def attention_weights(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    *,
    bias: Float[Array, "#batch #heads queries keys"] | None = None,
    visible: Bool[Array, "batch keys"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """The softmax probabilities themselves, dense and in float32: for looking at, not for speed."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqnd,bknd->bnqk", query.astype(jnp.float32), key.astype(jnp.float32))
    scores = scores * scale
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = jnp.where(visible[:, None, None, :], scores, -1e30)
    return jax.nn.softmax(scores, axis=-1)


class Attention(nn.Module):
    """Attention with fused (`qkv`) or separate (`query key value`) projections, then `out`.

    The columns of a fused `qkv` are ordered q, k, v, each head-major. Sows its probabilities as
    `attention` when the `intermediates` collection is mutable.

    Attributes:
      num_heads: must divide the channels.
      fused: one `qkv` matrix, or three.
      query_key_norm: LayerNorm of each head's query and key (`query_norm`, `key_norm`).
      scale: factor on q k^T; None is 1 / sqrt(head width).
      causal: whether a token sees only itself and those before it.
      attention_dropout: rate on the probabilities.
      dropout: rate after `out`.
      blind: what a query that sees no key gets: "zeros", or the "mean" of all values, which
        is what softmax gives where masked scores are large negative numbers.
    """

    num_heads: int
    fused: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    query_key_norm: bool = False
    scale: float | None = None
    causal: bool = False
    attention_dropout: float = 0.0
    dropout: float = 0.0
    epsilon: float = 1e-6
    blind: str = "zeros"
    kernel_init: Callable = nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch keys"] | None = None,
        train: bool = False,
        memory: Float[Array, "batch keys width"] | None = None,
        bias: Float[Array, "#batch #heads length keys"] | Callable | None = None,
    ) -> Float[Array, "batch length channels"]:
        """Attend to `memory`, which needs separate projections; without one to `x` itself.

        `visible` says which keys may be seen (padding is False); `bias` is added to the scores, or
        is a function of queries and keys that gives what is.
        """
        batch, length, channels = x.shape
        source = x if memory is None else memory
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        dense = partial(
            Dense,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        heads = (self.num_heads, channels // self.num_heads)
        if self.fused:
            if memory is not None:
                raise ValueError("Attention to a memory needs fused=False.")
            qkv = dense(3 * channels, use_bias=self.qkv_bias, name="qkv")(x)
            maps = jnp.split(qkv, 3, axis=-1)
        else:
            maps = [
                dense(channels, use_bias=self.qkv_bias, name=name)(t)
                for name, t in (("query", x), ("key", source), ("value", source))
            ]
        query, key, value = (t.reshape(*t.shape[:2], *heads) for t in maps)
        if self.query_key_norm:
            norm = partial(
                LayerNorm, epsilon=self.epsilon, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        query, key, value = (
            constrain(t, "batch", "length", "heads", "head_dim") for t in (query, key, value)
        )
        bias = bias(query, key) if callable(bias) else bias
        if self.is_mutable_collection("intermediates"):
            later = jnp.triu(jnp.full((1, 1, length, length), -1e30), 1) if self.causal else None
            both = later if bias is None else bias if later is None else later + bias
            weights = attention_weights(query, key, bias=both, visible=visible, scale=self.scale)
            self.sow("intermediates", "attention", weights)
        dropping = train and self.attention_dropout > 0
        segments = None if visible is None else visible.astype(jnp.int32)
        x = kernels_pallas.attention(
            query,
            key,
            value,
            bias=bias,
            # every query, padding included, sees exactly the visible keys
            query_segments=None if segments is None else jnp.ones((batch, length), jnp.int32),
            key_segments=segments,
            scale=self.scale,
            mask=kernels_pallas.Causal() if self.causal else None,
            dropout=self.attention_dropout if dropping else 0.0,
            rng=self.make_rng("dropout") if dropping else None,
        )
        if visible is not None and self.blind == "mean":
            sees = visible.any(-1)[:, None, None, None]
            x = jnp.where(sees, x, value.mean(1, keepdims=True))
        x = dense(channels, use_bias=self.out_bias, name="out")(x.reshape(batch, length, channels))
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class RelativeScores(nn.Module):
    """A bias by distance: the product of a query, and of a key where asked, with a learned vector.

        bias_ij = (q_i . t_{i-j} + k_j . t_{i-j}) / sqrt(head width)

    Shaw et al., "Self-Attention with Relative Position Representations", NAACL 2018, arXiv
    1803.02155; with keys: Huang et al., arXiv 2009.13658. As transformers has it in BERT.

    Attributes:
      max_positions: longest sequence.
      of_keys: whether keys take part.
      scaled: whether the root of the width is there.
    """

    max_positions: int
    of_keys: bool = False
    scaled: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch length heads head_dim"],
        key: Float[Array, "batch length heads head_dim"],
    ) -> Float[Array, "batch heads length length"]:
        """The bias; there is a vector for each distance, the most negative first."""
        length, width = query.shape[1], query.shape[-1]
        shape = (2 * self.max_positions - 1, width)
        table = self.param(
            "distance_embedding", nn.initializers.normal(0.02), shape, self.param_dtype
        )
        middle = self.max_positions - 1
        table = table[middle - length + 1 : middle + length].astype(self.dtype)
        distance = jnp.arange(length)[:, None] - jnp.arange(length) + length - 1

        def picked(x: Array, index: Array) -> Float[Array, "batch heads length length"]:
            products = jnp.einsum("blnd,rd->bnlr", x, table)
            return jnp.take_along_axis(products, index[None, None], -1)

        bias = picked(query, distance)
        if self.of_keys:
            bias = bias + picked(key, distance.T).swapaxes(2, 3)
        return bias * width**-0.5 if self.scaled else bias
