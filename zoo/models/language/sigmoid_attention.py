"""Sigmoid attention: a language model whose attention weights are sigmoids, without row sums.

Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", ICLR 2025,
arXiv 2409.04431; official code github.com/apple/ml-sigmoid-attention (Apple's licence), whose
attention_simulator we follow.

    w_ij = sigmoid(e^t (q_i . k_j / sqrt(d) + m (j - i)) + b)       q, k: LayerNorm, then rotary
    x = x + g1 attention(LN(x));   x = x + g2 W2 gelu(W1 LN(x));    logits = W LN(x)

Order and signs are the code's: ALiBi's slopes m_h fall with distance into the past. b is a fixed
number; at b = -log n, n the length that is trained on, the weights of a row add up to about one, as
those of softmax do, and training starts as calmly. That is the default here, with the paper's other
advice: ALiBi or rotary positions, LayerNorm of queries and keys. At large n the paper also puts a
norm behind attention (`hybrid_norm`). g (LayerScale) is for vision. t is 0 in all configurations.

b and t are in the collection `batch_stats`: published files hold them, and nothing trains them.
`activation` may be softmax, or a sigmoid divided by the number of the query's row, or its root.

    features            sigmoid_attention_realnews
    embed               128  3072    for 128 tokens
    layer0              128  3072
    last_hidden_state   128  3072    of the last block, not normalised
    logits              128  32100
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules
from zoo.layers import decoder
from zoo.layers.causal import Context, attention_state, check_tokens, continue_attention
from zoo.layers.decoder import check_causal
from zoo.layers.dense import Dense
from zoo.layers.mlp import gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.position import sinusoids
from zoo.layers.rotary import rotate_pairs
from zoo.system import System, Variant

init = nn.initializers.normal(0.02)

ACTIVATIONS = {
    "softmax": None,
    "sigmoid": lambda row: jnp.ones_like(row),
    "sqrt_seq_len_normalized_sigmoid": lambda row: 1 / jnp.sqrt(row),
    "seq_len_normalized_sigmoid": lambda row: 1 / row,
}
"""What becomes of scores: softmax, or sigmoids times this factor of the row (1, 2, ...)."""

POSITIONS = ("alibi", "rope", "sincos", "none")


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head (arXiv 2108.12409)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[::2][: heads - power]


class SigmoidAttention(nn.Module):
    """Attention of sigmoids; attributes are those of `SigmoidTransformer`.

    Its state is the values so far, and the keys with a channel more (b). It sows its weights as
    `attention` where the collection `intermediates` is mutable.
    """

    num_heads: int
    activation: str = "sigmoid"
    position: str = "alibi"
    bias: float = 0.0
    temperature: float = 0.0
    query_key_norm: bool = True
    causal: bool = True
    use_bias: bool = False
    epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def init_state(self, batch: int, channels: int, length: int) -> dict[str, Array]:
        """Room for the keys and values of `length` tokens."""
        heads, width = self.num_heads, channels // self.num_heads
        state = attention_state(batch, length, heads, width, self.dtype)
        return state | {"key": jnp.zeros((batch, heads, length, width + 1), self.dtype)}

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
        visible = context.mask
        at = jnp.arange(length) if context.positions is None else context.positions
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, use_bias=self.use_bias, kernel_init=init, **types)
        heads = (batch, length, self.num_heads, channels // self.num_heads)
        qkv = dense(3 * channels, name="qkv")(x)
        query, key, value = (
            constrain(t.reshape(heads), "batch", "length", "heads", "head_dim")
            for t in jnp.split(qkv, 3, axis=-1)
        )
        if self.query_key_norm:
            norm = partial(LayerNorm, epsilon=self.epsilon, **types)
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        if self.position == "rope":
            query, key = rotate_pairs(query, at), rotate_pairs(key, at)
        fixed = lambda name, value: self.variable(  # noqa: E731
            "batch_stats", name, lambda: jnp.full((1,), value, jnp.float32)
        ).value[0]
        factor = jnp.exp(fixed("temperature", self.temperature))
        shift = fixed("bias", self.bias)
        # b is one more channel: it is an array, and the kernel's own bias a number.
        query = query * (factor * heads[-1] ** -0.5).astype(query.dtype)
        query = jnp.concatenate([query, jnp.ones((*heads[:3], 1), query.dtype)], -1)
        last = jnp.broadcast_to(shift.astype(key.dtype), (*heads[:3], 1))
        key = jnp.concatenate([key, last], -1)
        slopes, table = None, None
        if self.position == "alibi":
            slopes = factor * jnp.asarray(alibi_slopes(self.num_heads), jnp.float32)
            if not self.causal:  # keys behind the query count up
                away = jnp.arange(length, dtype=jnp.float32)
                table = slopes[None, :, None, None] * (away - away[:, None])
                slopes = None
        scale = ACTIVATIONS[self.activation]
        options = {
            "score": kernels_pallas.Softmax() if scale is None else kernels_pallas.Sigmoid(0.0),
            "scale": 1.0,
            "slopes": slopes,
        }
        segments = None if visible is None else visible.astype(jnp.int32)
        dropping = train and self.dropout > 0
        if state is None:
            y = kernels_pallas.attention(
                query,
                key,
                value,
                bias=table,
                mask=kernels_pallas.Causal() if self.causal else None,
                query_segments=None if segments is None else jnp.ones_like(segments),
                key_segments=segments,
                dropout=self.dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
                **options,
            )
        else:
            options["query_offset"] = state["filled"]
            y, state = continue_attention(query, key, value, state, context, **options)
        if scale is not None:
            y = y * scale(at.astype(jnp.float32) + 1)[..., None, None].astype(y.dtype)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", self._weights(query, key, visible, factor))
        return dense(channels, name="out")(y.reshape(x.shape)), state

    def _weights(self, query, key, visible, factor) -> Float[Array, "batch heads queries keys"]:
        """The weights themselves, dense: for looking at, not for speed."""
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key).astype(jnp.float32)
        at = jnp.arange(query.shape[1])
        if self.position == "alibi":
            slopes = factor * jnp.asarray(alibi_slopes(self.num_heads), jnp.float32)
            scores = scores + slopes[:, None, None] * (at - at[:, None])
        seen = jnp.ones((1, 1, 1, 1), bool) if visible is None else visible[:, None, None]
        if self.causal:
            seen = seen & (at <= at[:, None])
        scores = jnp.where(seen, scores, -1e30)
        scale = ACTIVATIONS[self.activation]
        if scale is None:
            return jax.nn.softmax(scores, -1)
        return jax.nn.sigmoid(scores) * scale(at[:, None] + 1.0)


class SigmoidMlp(nn.Module):
    """`down(gelu(up(x)))`, whose first map never has a bias."""

    hidden: int
    use_bias: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length channels"], train: bool = False) -> Array:
        """The tokens after both maps."""
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        y = gelu(dense(self.hidden, use_bias=False, name="up")(x))
        y = constrain(y, "batch", "length", "mlp")
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return dense(x.shape[-1], use_bias=self.use_bias, name="down")(y)


class SigmoidBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and with an optional learned scale."""

    mixer: SigmoidAttention  # a template: its copy is the parameter group `attention`
    mlp_dim: int
    layer_scale: float | None = None
    hybrid_norm: bool = False
    mlp_bias: bool = False
    epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: dict | None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], dict | None]:
        """The tokens after both and, if there is a state, the next one."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        mixer = self.mixer.clone(name="attention", parent=self)
        y, state = mixer(norm(name="norm1")(x), state, train, context)
        y = norm(name="hybrid_norm")(y) if self.hybrid_norm else y
        x = x + self._scaled(drop(y), "layer_scale1")
        mlp = SigmoidMlp(self.mlp_dim, self.mlp_bias, self.dropout, name="mlp", **types)
        x = x + self._scaled(drop(mlp(norm(name="norm2")(x), train)), "layer_scale2")
        return constrain(x, "batch", "length", "channels"), state

    def _scaled(self, y: Array, name: str) -> Array:
        if self.layer_scale is None:
            return y
        start = nn.initializers.constant(self.layer_scale)
        return y * self.param(name, start, y.shape[-1:], self.param_dtype).astype(self.dtype)


class SigmoidTransformer(Model):
    """A language model with sigmoid attention.

    `init_state(batch, length)` and `step(state, tokens)` (through `apply(..., method="step")`) give
    the same logits token by token, or piece by piece, as a call on the whole text; with ALiBi,
    padding stands at the left.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      mlp_dim: width of the MLPs' middle; None: four times the channels.
      activation: of the scores, a key of `ACTIVATIONS`.
      position: "alibi", "rope", "sincos" (added to the embedding) or "none".
      bias: b; None: -log(train_length).
      train_length: the length that is trained on.
      temperature: t, the logarithm of the factor on the scores.
      query_key_norm: LayerNorm of each head's queries and keys, one for all heads.
      layer_scale: where the learned scales of both branches start; None: no scales.
      hybrid_norm: a LayerNorm behind attention, too.
      causal: whether tokens see only those before them.
      use_bias: biases of attention's maps.
      mlp_bias: a bias behind the MLP.
      dropout: rate on both branches and in the MLP.
      attention_dropout: rate on the attention weights.
    """

    vocab_size: int = 32100
    embed_dim: int = 384
    depth: int = 1
    num_heads: int = 12
    mlp_dim: int | None = None
    activation: str = "sigmoid"
    position: str = "alibi"
    bias: float | None = None
    train_length: int = 1024
    temperature: float = 0.0
    query_key_norm: bool = True
    layer_scale: float | None = None
    hybrid_norm: bool = False
    causal: bool = True
    use_bias: bool = False
    mlp_bias: bool = False
    epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        return {"tokens": shape, "mask": shape}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits at every token; `mask` is 0 or False for padding, which nobody sees.

        Raises:
          ValueError: if shapes or fields do not fit.
        """
        return self.features(tokens, mask, train)["logits"]

    def init_state(self, batch: int, length: int) -> dict:
        """The state before the first token, with room for `length` tokens.

        Raises:
          ValueError: if the model is not causal.
        """
        check_causal(self)
        layers = (self._mixer().init_state(batch, self.embed_dim, length),) * self.depth
        return {"position": jnp.zeros(batch, jnp.int32), "layers": layers}

    def step(
        self, state: dict, tokens: Int[Array, "batch length"], mask: Array | None = None
    ) -> tuple[dict, Float[Array, "batch length vocab_size"]]:
        """Continue by one or more tokens: the state after them, and their logits."""
        return decoder.step(self, state, tokens, mask)

    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        tokens, mask = check_tokens(self, tokens, mask)
        return self._run(tokens, None, train, Context(mask))[0]

    @nn.compact
    def _run(
        self, tokens: Array, state: tuple | None, train: bool, context: Context
    ) -> tuple[dict[str, Array], tuple | None]:
        self._check()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types)(
            tokens
        )
        if self.position == "sincos":
            x = x + self._sines(tokens.shape[1], state, context)
        x = constrain(x, "batch", "length", "channels")
        out = {"embed": x}
        block = partial(
            SigmoidBlock,
            self._mixer(),
            self.mlp_dim or 4 * self.embed_dim,
            self.layer_scale,
            self.hybrid_norm,
            self.mlp_bias,
            self.epsilon,
            self.dropout,
            **types,
        )
        every, state = decoder.run_blocks([block] * self.depth, x, state, train, context)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        x = out["last_hidden_state"] = every[-1] if every else x
        x = LayerNorm(epsilon=self.epsilon, name="norm", **types)(x)
        x = Dense(self.vocab_size, use_bias=False, kernel_init=init, name="head", **types)(x)
        return out | {"logits": constrain(x, "batch", "length", "vocab")}, state

    def _mixer(self) -> SigmoidAttention:
        bias = -math.log(self.train_length) if self.bias is None else self.bias
        return SigmoidAttention(
            self.num_heads, self.activation, self.position, bias, self.temperature,
            self.query_key_norm, self.causal, self.use_bias, self.epsilon, self.attention_dropout,
            dtype=self.dtype, param_dtype=self.param_dtype, parent=None,
        )  # fmt: skip

    def _sines(self, length: int, state: tuple | None, context: Context) -> Array:
        """What is added to the embedding; with a state, of as many positions as it has room for."""
        room = length if state is None else state[0]["text"].shape[1]
        table = jnp.asarray(sinusoids(room, self.embed_dim), self.dtype)
        if context.positions is None:
            return table
        return jnp.take(table, context.positions, axis=0, mode="fill", fill_value=jnp.nan)

    def _check(self) -> None:
        for field, known in (("activation", ACTIVATIONS), ("position", POSITIONS)):
            if getattr(self, field) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {names}.")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {self.embed_dim} channels; choose a "
                "divisor."
            )


_BLOCK, _OURS = "blocks.{i}", "layers_{i}"

LAYOUTS = {
    "official": Rules(
        [
            Rule("input_embedding.weight", "embed/embedding"),
            *norm_rules(f"{_BLOCK}.norm1", f"{_OURS}/norm1"),
            *dense_rules(f"{_BLOCK}.attn.qkv", f"{_OURS}/attention/qkv"),
            *norm_rules(f"{_BLOCK}.attn.q_norm", f"{_OURS}/attention/query_norm"),
            *norm_rules(f"{_BLOCK}.attn.k_norm", f"{_OURS}/attention/key_norm"),
            *dense_rules(f"{_BLOCK}.attn.proj", f"{_OURS}/attention/out"),
            Rule(f"{_BLOCK}.attn.attn_bias", f"batch_stats/{_OURS}/attention/bias"),
            Rule(f"{_BLOCK}.attn.attn_temp", f"batch_stats/{_OURS}/attention/temperature"),
            Rule(f"{_BLOCK}.ls1.gamma", f"{_OURS}/layer_scale1"),
            *norm_rules(f"{_BLOCK}.norm2", f"{_OURS}/norm2"),
            *dense_rules(f"{_BLOCK}.mlp.fc1", f"{_OURS}/mlp/up"),
            *dense_rules(f"{_BLOCK}.mlp.fc2", f"{_OURS}/mlp/down"),
            Rule(f"{_BLOCK}.ls2.gamma", f"{_OURS}/layer_scale2"),
            *norm_rules("output_embedding.norm", "norm"),
            *dense_rules("output_embedding.linear", "head"),
            # The authors' blocks have no norm behind attention; the name is ours.
            *norm_rules(f"{_BLOCK}.hybrid_norm", f"{_OURS}/hybrid_norm"),
        ],
        fresh=("head/*",),
    )
}

_COMMON = dict(
    module=SigmoidTransformer,
    task="language_modelling",
    paper="Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv 2409.04431",
    code="github.com/apple/ml-sigmoid-attention",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    "sigmoid_attention_shakespeare": Variant(
        fields=dict(position="rope", bias=-10.0, train_length=64), **_COMMON,
    ),
    "sigmoid_attention_realnews": Variant(fields=dict(embed_dim=3072, bias=0.0), **_COMMON),
    "sigmoid_attention_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, train_length=48,
                    layer_scale=1e-4),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
