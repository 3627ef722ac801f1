"""ByteTransformer: BERT without work on padding.

Zhai et al., "ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
IPDPS 2023, arXiv 2210.03052; official code github.com/bytedance/ByteTransformer (Apache-2.0, CUDA).
The network is BERT's (`zoo.models.language.bert`), with its weights; what changes is its order of
work. From the mask follow the places of the N real tokens of a batch of B texts of up to S tokens:

    places[n] = b S + s                             found once
    x = E[tokens[places]] + P[s] + T[types]         N rows, not B S
    maps, LayerNorms and MLPs on N rows; attention alone knows texts
    y[places] = x, zero elsewhere                   once, behind the last layer

N is a shape, so it is part of the compiled program: `rows` says how many there are, at least as
many as tokens (`rows_for` rounds up, so that few programs are compiled); more tokens than rows give
NaN. The rows that are left over are a text of their own. Attention runs on texts put back into
`[B, S]` (`packed=False`: B S^2 scores), or on the packed rows with a number for each text
(`packed=True`: the TPU and GPU kernels skip blocks of other texts; XLA forms the scores of rows
that stand less than S apart, as a text has no more).

Three published forms disagree: epsilon 1e-12 and erf in the GELU (Hugging Face, the default here),
1e-5 and erf (the unit test), 1e-6 and tanh (the CUDA kernels): `epsilon` and `activation`.

    features            byte_transformer_base
    packed_hidden            768    for each row, 128 without padding
    last_hidden_state   128  768    for 128 tokens
    pooled                   768
    logits              128  768
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from kernels_pallas import SlidingWindow
from zoo.layers.causal import check_tokens
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.models.language import bert
from zoo.models.language.bert import ACTIVATIONS
from zoo.system import System, Variant

init = bert.init

Rows = Float[Array, "1 rows channels"]


def rows_for(mask: np.ndarray, multiple: int = 128) -> int:
    """How many rows a batch needs, rounded up, so that few sizes occur."""
    return max(1, -(-int(np.count_nonzero(mask)) // multiple)) * multiple


def places_of(mask: Bool[Array, "batch length"], rows: int) -> Int[Array, "rows"]:
    """Where the real tokens stand in the flat batch; `batch * length` for rows left over."""
    return jnp.flatnonzero(mask, size=rows, fill_value=mask.size)


def pack(x: Float[Array, "batch length *rest"], places: Int[Array, "rows"]) -> Array:
    """The rows at `places`; zeros for rows left over."""
    flat = x.reshape(-1, *x.shape[2:])
    return jnp.take(flat, places, axis=0, mode="fill", fill_value=0)


def unpack(
    rows: Float[Array, "rows *rest"], places: Int[Array, "rows"], batch: int, length: int
) -> Float[Array, "batch length *rest"]:
    """The inverse of `pack`, with zeros where no row belongs."""
    flat = jnp.zeros((batch * length, *rows.shape[1:]), rows.dtype)
    flat = flat.at[places].set(rows, mode="drop")
    return flat.reshape(batch, length, *rows.shape[1:])


class PackedAttention(nn.Module):
    """Self-attention of packed texts, and its maps on packed rows."""

    num_heads: int
    packed: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Rows,
        places: Int[Array, "rows"],
        mask: Bool[Array, "batch length"],
        train: bool = False,
    ) -> Rows:
        """Attend: a row sees the rows of its own text."""
        channels = x.shape[-1]
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        query, key, value = (
            constrain(
                dense(channels, name=name)(x).reshape(*x.shape[:2], self.num_heads, -1),
                "batch", "length", "heads", "head_dim",
            )
            for name in ("query", "key", "value")
        )  # fmt: skip
        dropping = train and self.dropout > 0
        options = {
            "dropout": self.dropout if dropping else 0.0,
            "rng": self.make_rng("dropout") if dropping else None,
        }
        if self.packed:
            longest = mask.shape[1]
            text = (places // longest)[None]
            near = SlidingWindow(longest - 1, longest - 1) if x.shape[1] > longest else None
            y = kernels_pallas.attention(
                query, key, value, mask=near, query_segments=text, **options
            )
        else:
            texts = (unpack(t[0], places, *mask.shape) for t in (query, key, value))
            segments = mask.astype(jnp.int32)
            y = kernels_pallas.attention(
                *texts,
                query_segments=jnp.ones_like(segments),
                key_segments=segments,
                **options,
            )
            y = pack(y, places)[None]
        return dense(channels, name="out")(y.reshape(x.shape))


class PackedLayer(nn.Module):
    """BERT's layer on packed rows: a LayerNorm behind each residual sum."""

    mixer: PackedAttention  # a template: its copy is the parameter group `attention`
    mlp_dim: int
    activation: str
    epsilon: float
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Rows,
        places: Int[Array, "rows"],
        mask: Bool[Array, "batch length"],
        train: bool = False,
    ) -> Rows:
        """The rows after both."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = self.mixer.clone(name="attention", parent=self)
        x = norm(name="norm1")(x + drop(attention(x, places, mask, train)))
        activation = ACTIVATIONS[self.activation]
        mlp = Mlp(self.mlp_dim, activation, kernel_init=init, name="mlp", **types)
        return norm(name="norm2")(x + drop(mlp(x)))


class ByteTransformer(Model):
    """BERT's encoder on packed tokens; it takes the files of BERT's encoder.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      mlp_dim: channels in the middle of the MLP.
      max_positions: longest text.
      num_token_types: segments that can be told apart.
      activation: of the MLP, a key of `zoo.models.language.bert.ACTIVATIONS`.
      pooler: the tanh layer on the first token.
      rows: rows of the packed batch; None: as many as the padded batch has, which saves nothing.
      packed: whether attention, too, runs on packed rows.
      dropout: rate on the embedding and both branches.
      attention_dropout: rate on the weights.
    """

    vocab_size: int = 30522
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    num_token_types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    pooler: bool = True
    rows: int | None = None
    packed: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for texts of up to `length` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, min(length, self.max_positions)), jnp.int32)
        return {"tokens": shape, "token_types": shape, "mask": shape}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None = None,
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """The last hidden states, zero at padding.

        Args:
          tokens: numbers of words; at padding, anything.
          token_types: segment of each token; None is 0 everywhere.
          mask: 1 or True for tokens, 0 for padding, anywhere; None is no padding.
          train: whether to drop out.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, token_types, mask, train)["logits"]

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None = None,
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); arguments as those of `__call__`."""
        tokens, mask = check_tokens(self, tokens, mask)
        self._check(tokens, token_types)
        batch, length = tokens.shape
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows = batch * length if self.rows is None else self.rows
        places = places_of(mask, rows)
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        shape = (self.max_positions, self.embed_dim)
        positions = self.param("position_embedding", init, shape, self.param_dtype)
        shape = (self.num_token_types, self.embed_dim)
        kinds = self.param("token_type_embedding", init, shape, self.param_dtype)
        kind = jnp.zeros_like(tokens) if token_types is None else token_types
        x = embed(pack(tokens, places)) + positions.astype(self.dtype)[places % length]
        x = x + kinds.astype(self.dtype)[pack(kind, places)]
        x = LayerNorm(epsilon=self.epsilon, name="embed_norm", **types)(x[None])
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = constrain(x, "batch", "length", "channels")
        mixer = PackedAttention(
            self.num_heads, self.packed, self.attention_dropout, parent=None, **types
        )
        for i in range(self.depth):
            x = PackedLayer(
                mixer, self.mlp_dim, self.activation, self.epsilon, self.dropout,
                name=f"layers_{i}", **types,
            )(x, places, mask, train)  # fmt: skip
        full = mask.sum() > rows
        out = {"packed_hidden": jnp.where(full, jnp.nan, x[0])}
        x = jnp.where(full, jnp.nan, unpack(x[0], places, batch, length))
        out["last_hidden_state"] = out["logits"] = x
        if self.pooler:
            dense = Dense(self.embed_dim, kernel_init=init, name="pooler", **types)
            out["pooled"] = jnp.tanh(dense(x[:, 0]))
        return out

    def _check(self, tokens: Array, token_types: Array | None) -> None:
        if tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"This ByteTransformer reads at most {self.max_positions} tokens, not "
                f"{tokens.shape[1]}; cut the text, or create the model with more max_positions."
            )
        if token_types is not None and token_types.shape != tokens.shape:
            raise ValueError(
                f"token_types has shape {token_types.shape}; it should be that of tokens, "
                f"{tokens.shape}."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {self.embed_dim} channels; choose a "
                "divisor."
            )
        if self.activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation={self.activation!r} is none of {names}.")


LAYOUTS = bert.LAYOUTS

_COMMON = dict(
    module=ByteTransformer,
    task="text_encoding",
    paper="ByteTransformer, arXiv 2210.03052",
    code="github.com/bytedance/ByteTransformer",
    licence="Apache-2.0",
)

VARIANTS: dict[str, Variant] = {
    "byte_transformer_base": Variant(fields={}, params=109_482_240, **_COMMON),
    "byte_transformer_minilm_l6": Variant(
        fields=dict(embed_dim=384, depth=6, mlp_dim=1536), params=22_713_216, **_COMMON,
    ),
    "byte_transformer_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, mlp_dim=64,
                    max_positions=64),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
