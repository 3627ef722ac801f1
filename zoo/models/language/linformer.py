"""Linformer: self-attention of linear cost, by projecting keys and values along the sequence.

Wang, Li, Khabsa, Fang and Ma, "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768.
The authors' code is an example in github.com/facebookresearch/fairseq (MIT); we follow the names
and numbers of github.com/lucidrains/linformer (MIT). For n tokens, with learned E and F of shape
n x k, one pair a layer, shared by its heads:

    K' = E^T K;   V' = F^T V                      k rows instead of n
    out = softmax(Q K'^T / sqrt(d)) V'            cost n k

    x = x + attention(LN(x));   x = x + W2 gelu(W1 LN(x))          logits = W x + b, without a norm

A text of fewer than n tokens uses the first rows of E and F. Every token sees every other, so this
is an encoder: it cannot be made causal. The reference knows no padding; here `mask` zeroes what
padding would add to K' and V', which makes padded and unpadded texts equal.

    features            linformer_base_512_k256
    embed               512  768    for 512 tokens
    layer0              512  768    up to layer11
    last_hidden_state   512  768    the last of them
    logits              512  50265
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, dense_rules, linear, norm_rules
from zoo.layers.causal import check_tokens, check_zero_or_one
from zoo.layers.dense import Dense
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.residual import ResidualLayer, init, mlp_rules
from zoo.layers.reversible import run_reversible
from zoo.system import System, Variant


def uniform_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """How E and F start: uniform within 1 / sqrt(k)."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class LinformerAttention(nn.Module):
    """Attention to `projected` mixtures of the keys.

    Attributes:
      max_length: rows of E and F.
      projected: k, their columns.
      num_heads: query heads.
      head_dim: None: channels / num_heads.
      one_kv_head: one head of keys and values for all.
      share_kv: values are the keys, and F is E.
      dropout: rate on the weights.
    """

    max_length: int
    projected: int
    num_heads: int
    head_dim: int | None = None
    one_kv_head: bool = False
    share_kv: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        context: dict[str, Bool[Array, "batch length"] | None],
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """Attend; `context["visible"]` is False at padding, or None."""
        visible = context["visible"]
        batch, length, channels = x.shape
        head_dim = self.head_dim or channels // self.num_heads
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        kv_heads = 1 if self.one_kv_head else self.num_heads
        query = dense(self.num_heads * head_dim, use_bias=False, name="query")(x)
        key = value = dense(kv_heads * head_dim, use_bias=False, name="key")(x)
        if not self.share_kv:
            value = dense(kv_heads * head_dim, use_bias=False, name="value")(x)

        def along(name: str, t: Array) -> Array:
            shape = (self.max_length, self.projected)
            matrix = self.param(name, uniform_init, shape, self.param_dtype)
            matrix = matrix[:length].astype(self.dtype)
            t = t if visible is None else jnp.where(visible[:, :, None], t, 0)
            t = jnp.einsum("blc,lk->bkc", t, matrix)
            t = t.reshape(batch, self.projected, kv_heads, head_dim)
            return constrain(t, "batch", "length", "heads" if kv_heads > 1 else None, "head_dim")

        key = along("project_key", key)
        value = key if self.share_kv else along("project_value", value)
        query = query.reshape(batch, length, self.num_heads, head_dim)
        dropping = train and self.dropout > 0
        y = kernels_pallas.attention(
            constrain(query, "batch", "length", "heads", "head_dim"),
            key,
            value,
            dropout=self.dropout if dropping else 0.0,
            rng=self.make_rng("dropout") if dropping else None,
        )
        return dense(channels, name="out")(y.reshape(batch, length, -1))


class Linformer(Model):
    """Linformer with a word head at every token.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      max_length: longest text: rows of the positions, of E and of F.
      projected: k, the columns of E and F.
      head_dim: None: embed_dim / num_heads.
      one_kv_head: one head of keys and values for all.
      share_kv: values are the keys, and F is E.
      reversible: two streams, whose sum is read; training keeps the last layer's outputs only.
      dropout: rate on the attention weights and in the MLP.
    """

    vocab_size: int = 50265
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    max_length: int = 512
    projected: int = 256
    head_dim: int | None = None
    one_kv_head: bool = False
    share_kv: bool = False
    reversible: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 512
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, min(length, self.max_length)), jnp.int32)
        return {"tokens": shape, "mask": shape}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits of every word at every token; `mask` is 0 or False for padding.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, mask, train)["logits"]

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above; no layers if `reversible`)."""
        self._check(tokens, mask)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        shape = (self.max_length, self.embed_dim)
        table = self.param("position_embedding", init, shape, self.param_dtype)
        x = embed(tokens) + table[: tokens.shape[1]].astype(self.dtype)
        out = {"embed": constrain(x, "batch", "length", "channels")}
        mixer = LinformerAttention(
            self.max_length, self.projected, self.num_heads, self.head_dim, self.one_kv_head,
            self.share_kv, self.dropout, parent=None, **types,
        )  # fmt: skip
        layer = partial(ResidualLayer, mixer, self.embed_dim, dropout=self.dropout, **types)
        context = {"visible": None if mask is None else mask != 0}
        if self.reversible:
            x = sum(run_reversible(self, [layer] * self.depth, x, x, context, train))
        else:
            for i in range(self.depth):
                x = out[f"layer{i}"] = layer(name=f"layers_{i}")(x, context, train)
        out["last_hidden_state"] = x
        x = Dense(self.vocab_size, kernel_init=init, name="head", **types)(x)
        out["logits"] = constrain(x, "batch", "length", "vocab")
        return out

    def _check(self, tokens: Array, mask: Array | None) -> None:
        check_tokens(self, tokens)
        check_zero_or_one(mask)
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"This Linformer reads at most {self.max_length} tokens, not {tokens.shape[1]}; "
                "cut the text, or create the model with more max_length."
            )
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"mask has shape {mask.shape}; it should be that of tokens, {tokens.shape}."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {self.embed_dim} channels; choose a "
                "divisor."
            )


def _layout(attention: str, mlp: str) -> Rules:
    """Rules of one naming of the two halves of a layer."""
    ours = "layers_{i}"
    return Rules(
        [
            Rule("token_emb.weight", "embed/embedding"),
            Rule("pos_emb.weight", "position_embedding"),
            *norm_rules(f"{attention}.norm", f"{ours}/norm1"),
            Rule(f"{attention}.fn.proj_k", f"{ours}/attention/project_key"),
            Rule(f"{attention}.fn.proj_v", f"{ours}/attention/project_value"),
            *(
                Rule(f"{attention}.fn.to_{short}.weight", f"{ours}/attention/{name}/kernel", linear)
                for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
            ),
            *dense_rules(f"{attention}.fn.to_out", f"{ours}/attention/out"),
            *norm_rules(f"{mlp}.norm", f"{ours}/norm2"),
            *mlp_rules(f"{mlp}.fn", f"{ours}/mlp"),
            *dense_rules("to_logits", "head"),
        ],
        fresh=("head/*",),
    )


LAYOUTS = {
    "lucidrains": _layout("linformer.net.layers.{i}.0", "linformer.net.layers.{i}.1"),
    "lucidrains_reversible": _layout(
        "linformer.net.blocks.{i}.f.net", "linformer.net.blocks.{i}.g.net"
    ),
}

PARTITION = {r".*attention/project_(key|value)": ("channels", None)}

_COMMON = dict(
    module=Linformer,
    task="masked_language_modelling",
    paper="Linformer, arXiv 2006.04768",
    code="github.com/lucidrains/linformer",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    "linformer_base_512_k128": Variant(fields=dict(projected=128), **_COMMON),
    "linformer_base_512_k256": Variant(fields={}, **_COMMON),
    "linformer_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, max_length=64, projected=16),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS, layouts=LAYOUTS, decay=(r".*project_(key|value)",), partition=PARTITION
)
