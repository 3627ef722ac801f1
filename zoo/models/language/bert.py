"""BERT: a transformer encoder that reads in both directions; MiniLM and sentence encoders.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
NAACL 2019, arXiv 1810.04805; official code github.com/google-research/bert (Apache-2.0). Smaller
ones: Turc et al., arXiv 1908.08962; Wang et al., "MiniLM", arXiv 2002.10957. Sentence encoders:
Reimers and Gurevych, "Sentence-BERT", arXiv 1908.10084. Weights are published in the names of
Hugging Face's transformers, which we follow; unlike later encoders every LayerNorm stands behind
the residual sum (post-norm), and there is none at the end.

    x = LN(E_word[token] + E_position[t] + E_type[type])
    x = LN(x + attention(x));   x = LN(x + W2 gelu(W1 x + b1) + b2)          `depth` times
    pooled = tanh(W x[first] + b)

`mask` hides padding as a key from all queries; what stands at padded positions themselves means
nothing. With `cross_attention` each layer attends to a memory, too, between the two; that is the
decoder of transformers' EncoderDecoderModel, which is causal. `head` says what is read off:

    None             logits = last_hidden_state
    masked_lm        logits = E_word LN(gelu(W x + b)) + c         the matrix is the embedding's
    pretraining      logits = (those of masked_lm, next sentence = W pooled + b)
    next_sentence    logits = W pooled + b                         two
    classification   logits = W pooled + b
    token_classes    logits = W x + b                              of each token
    span             logits = W x + b                              start and end of an answer
    sentence         logits = mean of x over the mask, scaled to length one

    features             bert_base_uncased
    embeddings           128  768    for 128 tokens
    layer0               128  768    up to layer11
    last_hidden_state    128  768    the last of them
    pooled                    768
    logits               128  768
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, Transform, dense_rules, tied
from zoo.layers.attention import Attention, RelativeScores
from zoo.layers.causal import check_memory, check_tokens
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS, Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block
from zoo.system import File, System, Variant

init = nn.initializers.truncated_normal(0.02)


POSITION_TYPES = ("absolute", "relative_key", "relative_key_query")


class BertLayer(nn.Module):
    """Self-attention and MLP, each with a LayerNorm behind its residual sum."""

    num_heads: int
    mlp_dim: int
    activation: Callable[[Array], Array] = gelu
    epsilon: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    causal: bool = False
    relative: Callable[..., nn.Module] | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch length"] | None = None,
        train: bool = False,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_visible: Bool[Array, "batch keys"] | None = None,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        attention = partial(
            Attention,
            self.num_heads,
            fused=False,
            blind="mean",
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            kernel_init=init,
            **types,
        )
        bias = None if self.relative is None else self.relative(name="relative", **types)
        y = attention(causal=self.causal, name="attention")(x, visible, train, bias=bias)
        x = norm(name="norm1")(x + y)
        if memory is not None:
            y = attention(name="cross_attention")(x, memory_visible, train, memory)
            x = norm(name="cross_norm")(x + y)
        y = Mlp(self.mlp_dim, self.activation, kernel_init=init, name="mlp", **types)(x)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)  # behind `down` only
        x = norm(name="norm2")(x + y)
        return constrain(x, "batch", "length", "channels")


class MaskedLMHead(nn.Module):
    """Scores of all words at each position; `decode` multiplies by the embedding, transposed."""

    vocab_size: int
    word_dim: int | None = None
    activation: Callable[[Array], Array] = gelu
    epsilon: float = 1e-12
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], decode: Callable[[Array], Array]
    ) -> Float[Array, "batch length vocab_size"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Dense(self.word_dim or x.shape[-1], kernel_init=init, name="transform", **types)(x)
        x = LayerNorm(epsilon=self.epsilon, name="norm", **types)(self.activation(x))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), self.param_dtype)
        return constrain(decode(x) + bias.astype(self.dtype), "batch", "length", "vocab")


def mean_pool(
    x: Float[Array, "batch length channels"], mask: Int[Array, "batch length"] | None = None
) -> Float[Array, "batch channels"]:
    """The mean over the tokens that `mask` keeps (all without a mask; zeros if it keeps none)."""
    if mask is None:
        return x.mean(1)
    keep = (mask != 0).astype(x.dtype)
    return jnp.einsum("blc,bl->bc", x, keep) / jnp.maximum(keep.sum(1, keepdims=True), 1e-9)


def max_pool(
    x: Float[Array, "batch length channels"], mask: Int[Array, "batch length"] | None = None
) -> Float[Array, "batch channels"]:
    """The largest value of each channel over the tokens that `mask` keeps."""
    return x.max(1) if mask is None else jnp.where(mask[..., None] != 0, x, -1e9).max(1)


POOLINGS: dict[str, Callable[..., Array]] = {
    "mean": mean_pool,
    "cls": lambda x, mask: x[:, 0],
    "max": max_pool,
}
"""How `head="sentence"` makes one vector, as sentence-transformers names it."""


def unit_length(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """`x / |x|`; zeros, and their gradient, stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


class Bert(Model):
    """BERT encoder, with or without a head.

    Attributes:
      vocab_size: words.
      embed_dim: channels of the whole encoder.
      mlp_dim: channels in the middle of the MLP.
      max_positions: longest sequence.
      position_type: `absolute`, a vector for each position that is added to the words; in its place
        `relative_key` and `relative_key_query`: in each layer a vector for each distance, by which
        queries, or both queries and keys, are multiplied (`zoo.layers.attention.RelativeScores`).
      relative_scaled: whether these products are over the root of a head's width, as all scores.
      num_token_types: segments that can be told apart; 0: none (DistilBERT).
      word_dim: width of the embeddings, which a map takes to `embed_dim` (ALBERT); None: that.
      groups: sets of weights that so many layers in a row share (ALBERT); 0: each has its own.
      inner_layers: layers of its own in each set, which run one after another as one layer.
      causal: a token sees only itself and those before it (BERT as a decoder).
      cross_attention: layers have a second attention, to the `memory` that a call gives; without
        one it is passed over.
      activation: of MLP and masked-word head, a key of `ACTIVATIONS`.
      pooler: the layer on the first token; the heads that read it need it.
      pooler_activation: of that layer, a key of `ACTIVATIONS`.
      head: None or a key of `HEADS` (see the table above).
      num_classes: of the classification heads.
      pooling: of `head="sentence"`, a key of `POOLINGS`.
      scan_layers: one stacked `layers` instead of `layers_0 ...`, compiled once
        (`zoo.layers.stack` converts the parameters).
      remat: recompute layers in the backward pass instead of keeping their activations; True, or
        what is kept nevertheless, by `zoo.layers.stack.REMAT`.
    """

    vocab_size: int = 30522
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    position_type: str = "absolute"
    relative_scaled: bool = True
    num_token_types: int = 2
    word_dim: int | None = None
    groups: int = 0
    inner_layers: int = 1
    causal: bool = False
    cross_attention: bool = False
    activation: str = "gelu"
    epsilon: float = 1e-12
    pooler: bool = True
    pooler_activation: str = "tanh"
    head: str | None = None
    num_classes: int = 2
    pooling: str = "mean"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    scan_layers: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, min(length, self.max_positions)), jnp.int32)
        types = {"token_types": shape} if self.num_token_types else {}
        inputs = {"tokens": shape, **types, "mask": shape}
        if self.cross_attention:
            wide = (*shape.shape, self.embed_dim)
            inputs |= {"memory": jax.ShapeDtypeStruct(wide, self.dtype), "memory_mask": shape}
        return inputs

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None = None,
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        train: bool = False,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"] | None = None,
    ) -> Array | tuple[Array, Array]:
        """What the head gives (see the table above); without one, the last hidden states.

        Args:
          tokens: numbers of words.
          token_types: segment of each token; None is 0 everywhere.
          mask: 1 or True for tokens, 0 for padding; None is no padding.
          positions: rows of the position table; None is 0, 1, ... in order.
          train: whether to drop out.
          memory: what `cross_attention` looks at, such as the hidden states of an encoder.
          memory_mask: 1 or True for what of it is there; None is all.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, token_types, mask, positions, train, memory, memory_mask)[
            "logits"
        ]

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None = None,
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        train: bool = False,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"] | None = None,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); arguments as those of `__call__`."""
        self._check(tokens, token_types, mask, positions)
        check_memory(self, tokens, memory, memory_mask, optional=True)
        tokens, mask = check_tokens(self, tokens, mask, positions)
        token_types = self._inside(token_types, mask, self.num_token_types, "token_types")
        positions = self._inside(positions, mask, self.max_positions, "positions")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.word_dim or self.embed_dim
        embed = nn.Embed(self.vocab_size, width, embedding_init=init, name="embed", **types)
        x = embed(tokens) + self._positions(tokens.shape[1], positions)
        x = x + self._types(token_types) if self.num_token_types else x
        x = LayerNorm(epsilon=self.epsilon, name="embed_norm", **types)(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = constrain(x, "batch", "length", "channels")
        out = {"embeddings": x}
        if self.word_dim is not None:
            x = Dense(self.embed_dim, kernel_init=init, name="embed_map", **types)(x)

        seen = tuple(None if m is None else m != 0 for m in (mask, memory_mask))
        every = self._layers(x, seen[0], train, memory, seen[1])
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        x = out["last_hidden_state"] = every[-1] if every else x
        if self.pooler:
            dense = nn.Dense(self.embed_dim, kernel_init=init, name="pooler", **types)
            out["pooled"] = ACTIVATIONS[self.pooler_activation](dense(x[:, 0]))
        out["logits"] = x
        return out if self.head is None else out | HEADS[self.head](self, out, embed, mask, train)

    def _positions(self, length: int, positions: Array | None) -> Float[Array, "... channels"]:
        shape = (self.max_positions, self.word_dim or self.embed_dim)
        if self.position_type != "absolute":  # published files have the table nevertheless
            self.param("unused_position_embedding", init, shape, self.param_dtype)
            return jnp.zeros((), self.dtype)
        table = self.param("position_embedding", init, shape, self.param_dtype)
        table = table.astype(self.dtype)
        return table[:length] if positions is None else jnp.take(table, positions, axis=0)

    def _types(self, token_types: Array | None) -> Float[Array, "... channels"]:
        shape = (self.num_token_types, self.word_dim or self.embed_dim)
        table = self.param("token_type_embedding", init, shape, self.param_dtype)
        table = table.astype(self.dtype)
        return table[0] if token_types is None else jnp.take(table, token_types, axis=0)

    def _layers(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch length"] | None,
        train: bool,
        *memory: Array | None,
    ) -> list[Array]:
        """What each layer gives; `memory` is one with what of it is visible."""
        relative = None
        if self.position_type != "absolute":
            of_keys = self.position_type == "relative_key_query"
            relative = partial(RelativeScores, self.max_positions, of_keys, self.relative_scaled)
        layer = partial(
            remat_block(BertLayer, self.remat, static_argnums=(3,), scanned=self.scan_layers),
            self.num_heads,
            self.mlp_dim,
            ACTIVATIONS[self.activation],
            self.epsilon,
            self.dropout,
            self.attention_dropout,
            self.causal,
            relative,
            self.dtype,
            self.param_dtype,
        )
        if not self.scan_layers:
            every, count, inner = [], self.groups or self.depth, range(self.inner_layers)
            layers = [
                [layer(name=f"layers_{i}_inner_{j}" if j else f"layers_{i}") for j in inner]
                for i in range(count)
            ]
            for i in range(self.depth):
                for one in layers[i * count // self.depth]:
                    x = one(x, visible, train, *memory)
                every.append(x)
            return every

        def body(layer: nn.Module, x: Array, visible: Array | None, *memory) -> tuple[Array, Array]:
            x = layer(x, visible, train, *memory)
            return x, x

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        last, stacked = scan(layer(name="layers"), x, visible, *memory)
        return [*list(stacked)[:-1], last]  # training reads, and so keeps, the last alone

    def _inside(
        self, numbers: Array | None, mask: Array | None, rows: int, name: str
    ) -> Array | None:
        """Numbers of rows of a table: those outside are 0 at padding, else NaN's row if traced."""
        if numbers is None or not rows:
            return numbers
        wrong = (numbers < 0) | (numbers >= rows)
        if mask is not None and mask.shape == numbers.shape:
            numbers = jnp.where(wrong & ~mask, 0, numbers)
            wrong &= mask
        if not isinstance(wrong, jax.core.Tracer) and bool(wrong.any()):
            raise ValueError(f"{name} are 0 to {rows - 1} in this model, not {numbers[wrong][0]}.")
        return jnp.where(wrong, rows, numbers)

    def _check(
        self,
        tokens: Array,
        token_types: Array | None,
        mask: Array | None,
        positions: Array | None,
    ) -> None:
        if tokens.ndim == 2 and tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"This BERT reads at most {self.max_positions} tokens, not {tokens.shape[1]}; cut "
                "the text, or create the model with more max_positions."
            )
        for name, value in (("token_types", token_types), ("mask", mask), ("positions", positions)):
            shapes = (tokens.shape, (1, *tokens.shape[1:]) if name == "positions" else tokens.shape)
            if value is not None and value.shape not in shapes:
                raise ValueError(
                    f"{name} has shape {value.shape}; it should be that of tokens, {tokens.shape}."
                )
        for name, value, known in (
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("head", self.head, (None, *HEADS)),
            ("position_type", self.position_type, POSITION_TYPES),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, known))}.")
        pooled = ("pretraining", "next_sentence", "classification")
        if self.inner_layers > 1 and self.scan_layers:
            raise ValueError(
                f"inner_layers={self.inner_layers} needs scan_layers=False, which runs them."
            )
        if self.groups and (self.scan_layers or self.depth % self.groups):
            raise ValueError(
                f"groups={self.groups} of a depth of {self.depth}: choose a divisor, and "
                "scan_layers=False, which needs a set of weights for each layer."
            )
        if token_types is not None and not self.num_token_types:
            raise ValueError("This model has num_token_types=0; leave out token_types.")
        if self.head in pooled and not self.pooler:
            raise ValueError(f"head={self.head!r} reads the pooler; it needs pooler=True.")


# ---------------------------------------------------------------------------------- heads
# Each is called in the model's compact method and gives what it adds to the features.


def _types(model: Bert) -> dict:
    return {"dtype": model.dtype, "param_dtype": model.param_dtype}


def _masked_lm(model: Bert, out: dict, embed: nn.Embed, mask: Array | None, train: bool) -> dict:
    head = MaskedLMHead(
        model.vocab_size,
        model.word_dim,
        ACTIVATIONS[model.activation],
        model.epsilon,
        name="predictions",
        **_types(model),
    )
    return {"logits": head(out["last_hidden_state"], embed.attend)}


def _pretraining(model: Bert, out: dict, embed: nn.Embed, mask: Array | None, train: bool) -> dict:
    words = _masked_lm(model, out, embed, mask, train)["logits"]
    dense = nn.Dense(2, kernel_init=init, name="next_sentence", **_types(model))
    return {"logits": (words, dense(out["pooled"]))}


def _next_sentence(
    model: Bert, out: dict, embed: nn.Embed, mask: Array | None, train: bool
) -> dict:
    dense = nn.Dense(2, kernel_init=init, name="next_sentence", **_types(model))
    return {"logits": dense(out["pooled"])}


def _token_classes(
    model: Bert, out: dict, embed: nn.Embed, mask: Array | None, train: bool
) -> dict:
    x = nn.Dropout(model.dropout)(out["last_hidden_state"], deterministic=not train)
    dense = nn.Dense(model.num_classes, kernel_init=init, name="head", **_types(model))
    return {"logits": dense(x)}


def _span(model: Bert, out: dict, embed: nn.Embed, mask: Array | None, train: bool) -> dict:
    dense = nn.Dense(2, kernel_init=init, name="span", **_types(model))
    return {"logits": dense(out["last_hidden_state"])}


def _classification(
    model: Bert, out: dict, embed: nn.Embed, mask: Array | None, train: bool
) -> dict:
    x = nn.Dropout(model.dropout)(out["pooled"], deterministic=not train)
    dense = nn.Dense(model.num_classes, kernel_init=init, name="head", **_types(model))
    return {"logits": dense(x)}


def _sentence(model: Bert, out: dict, embed: nn.Embed, mask: Array | None, train: bool) -> dict:
    hidden = out["last_hidden_state"].astype(jnp.float32)
    if model.pooling not in POOLINGS:
        raise ValueError(f"pooling={model.pooling!r} is none of {', '.join(POOLINGS)}.")
    return {"logits": unit_length(POOLINGS[model.pooling](hidden, mask))}


HEADS: dict[str, Callable[..., dict]] = {
    "masked_lm": _masked_lm,
    "pretraining": _pretraining,
    "next_sentence": _next_sentence,
    "classification": _classification,
    "token_classes": _token_classes,
    "span": _span,
    "sentence": _sentence,
}
"""What can be read off the encoder (see the table above)."""

# ---------------------------------------------------------------------------- checkpoints


def _position_ids(model: Bert) -> np.ndarray:
    return np.arange(model.max_positions)[None]


def _repeated(names: tuple[str, ...]) -> Transform:
    """Embedding and bias, then those of the decoder's copies that `names` says: they are equal."""
    places = [("weight", "bias").index(name) for name in names]

    def forward(xs: list[np.ndarray]) -> list[np.ndarray]:
        for place, copy in zip(places, xs[2:], strict=True):
            tied.forward([xs[place], copy])
        return xs[:2]

    return Transform(forward, lambda xs: [*xs, *(xs[place] for place in places)])


def _layout(
    prefix: str = "",
    *,
    repeated: tuple[str, ...] = (),
    norm: tuple[str, str] = ("weight", "bias"),
    position_ids: bool = False,
) -> Rules:
    """Rules of one published naming.

    Args:
      prefix: of the encoder's names: empty in a file of the encoder alone, `bert.` beside a head.
      repeated: what the file holds a second time, as the decoder's: `weight`, `bias`.
      norm: names of LayerNorm's scale and bias.
      position_ids: whether export writes the numbers of the positions.
    """

    def norms(theirs: str, ours: str) -> list[Rule]:
        return [
            Rule(f"{theirs}.{norm[0]}", f"{ours}/scale"),
            Rule(f"{theirs}.{norm[1]}", f"{ours}/bias"),
        ]

    theirs, ours = f"{prefix}encoder.layer.{{i}}", "layers_{i}"
    words, scores = f"{prefix}embeddings.word_embeddings.weight", "cls.predictions.bias"
    decoder = tuple(f"cls.predictions.decoder.{name}" for name in repeated)
    encoder = [
        Rule(words, "embed/embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "position_embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "unused_position_embedding"),
        Rule(
            f"{theirs}.attention.self.distance_embedding.weight",
            f"{ours}/relative/distance_embedding",
        ),
        Rule(f"{prefix}embeddings.token_type_embeddings.weight", "token_type_embedding"),
        *norms(f"{prefix}embeddings.LayerNorm", "embed_norm"),
        *dense_rules(f"{theirs}.attention.self.query", f"{ours}/attention/query"),
        *dense_rules(f"{theirs}.attention.self.key", f"{ours}/attention/key"),
        *dense_rules(f"{theirs}.attention.self.value", f"{ours}/attention/value"),
        *dense_rules(f"{theirs}.attention.output.dense", f"{ours}/attention/out"),
        *norms(f"{theirs}.attention.output.LayerNorm", f"{ours}/norm1"),
        *(
            rule
            for name in ("query", "key", "value")
            for rule in dense_rules(
                f"{theirs}.crossattention.self.{name}", f"{ours}/cross_attention/{name}"
            )
        ),
        *dense_rules(f"{theirs}.crossattention.output.dense", f"{ours}/cross_attention/out"),
        *norms(f"{theirs}.crossattention.output.LayerNorm", f"{ours}/cross_norm"),
        *dense_rules(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.output.dense", f"{ours}/mlp/down"),
        *norms(f"{theirs}.output.LayerNorm", f"{ours}/norm2"),
        *dense_rules(f"{prefix}pooler.dense", "pooler"),
    ]
    heads = [
        # Both in one rule, so that export repeats the embedding only beside a decoder.
        Rule(
            (words, scores, *decoder), ("embed/embedding", "predictions/bias"), _repeated(repeated)
        ),
        Rule(scores, "predictions/bias"),
        *dense_rules("cls.predictions.transform.dense", "predictions/transform"),
        *norms("cls.predictions.transform.LayerNorm", "predictions/norm"),
        *dense_rules("cls.seq_relationship", "next_sentence"),
        *dense_rules("classifier", "head"),
        *dense_rules("qa_outputs", "span"),
    ]
    return Rules(
        (*heads, *encoder) if prefix else encoder,
        derived={f"{prefix}embeddings.position_ids": _position_ids if position_ids else None},
        unused=(f"{prefix}pooler.dense.*", *(_OTHER_HEADS if prefix else ())),
        fresh=("head/*", "span/*", "predictions/*", "next_sentence/*", "pooler/*"),
    )


_OTHER_HEADS = ("cls.*", "classifier.*", "qa_outputs.*")
_OLD_NORM = ("gamma", "beta")

LAYOUTS = {
    # What transformers writes today: the encoder alone, models with a head, their torch files.
    "huggingface": _layout(),
    "huggingface_heads": _layout("bert."),
    "huggingface_heads_torch": _layout("bert.", repeated=("weight", "bias")),
    # Its versions 3 to 4.30.
    "huggingface_v3": _layout(position_ids=True),
    "huggingface_v3_heads": _layout("bert.", repeated=("weight", "bias"), position_ids=True),
    # The first years.
    "huggingface_v0": _layout(norm=_OLD_NORM),
    "huggingface_v0_heads": _layout("bert.", repeated=("weight",), norm=_OLD_NORM),
}

# ------------------------------------------------------------------------------- variants


def _fields(depth: int, embed_dim: int, vocab_size: int = 30522, **more) -> dict:
    head_dim = 32 if embed_dim == 384 else 64
    return {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": embed_dim // head_dim,
        "mlp_dim": 4 * embed_dim,
        **more,
    }


def _flops(fields: dict, length: int = 128) -> float:
    """Multiply-adds of one sequence: matrices of the layers and the two attention products."""
    width = fields["embed_dim"]
    return float(fields["depth"] * (12 * length * width**2 + 2 * length**2 * width))


_TASKS = {
    None: "text_encoding",
    "masked_lm": "masked_language_modelling",
    "pretraining": "text_pretraining",
    "next_sentence": "text_classification",
    "classification": "text_classification",
    "token_classes": "token_classification",
    "span": "question_answering",
    "sentence": "sentence_embedding",
}


def _variant(
    depth: int,
    embed_dim: int,
    params: int | None = None,
    *,
    paper: str = "BERT, arXiv 1810.04805",
    code: str = "github.com/google-research/bert",
    licence: str = "Apache-2.0",
    metric: str = "",
    sha256: str | None = None,
    **more,
) -> Variant:
    fields = _fields(depth, embed_dim, **more)
    return Variant(
        module=Bert,
        fields=fields,
        task=_TASKS[fields.get("head")],
        params=params,
        flops=_flops(fields),
        metric=metric,
        paper=paper,
        code=code,
        licence=licence,
        files=(
            File("model.safetensors", sha256),
            *(() if sha256 else (File("pytorch_model.bin"),)),
        ),
    )


def _with_heads(
    name: str, depth: int, embed_dim: int, params: tuple[int, int, int], **more
) -> dict:
    """The encoder and the same file with heads; `params`: encoder, pretraining, masked_lm."""
    return {
        name: _variant(depth, embed_dim, params[0], **more),
        f"{name}_pretraining": _variant(depth, embed_dim, params[1], head="pretraining", **more),
        f"{name}_mlm": _variant(
            depth, embed_dim, params[2], head="masked_lm", pooler=False, **more
        ),
        f"{name}_classification": _variant(depth, embed_dim, head="classification", **more),
    }


_small = partial(_variant, paper="Well-Read Students Learn Better, arXiv 1908.08962")
_minilm = partial(
    _variant,
    paper="MiniLM, arXiv 2002.10957",
    code="github.com/microsoft/unilm/tree/master/minilm",
    licence="MIT",
)
_sentence = partial(
    _variant,
    head="sentence",
    paper="Sentence-BERT, arXiv 1908.10084; MiniLM, arXiv 2002.10957",
    code="github.com/UKPLab/sentence-transformers",
)

_MINILM_SHA = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

VARIANTS = {
    **_with_heads(
        "bert_base_uncased",
        12,
        768,
        (109_482_240, 110_106_428, 109_514_298),
        metric="84.6 % MNLI-m, fine-tuned",
    ),
    **_with_heads(
        "bert_large_uncased",
        24,
        1024,
        (335_141_888, 336_226_108, 335_174_458),
        metric="86.7 % MNLI-m, fine-tuned",
    ),
    **_with_heads(
        "bert_base_cased",
        12,
        768,
        (108_310_272, 108_932_934, 108_340_804),
        vocab_size=28996,
    ),
    **_with_heads(
        "bert_large_cased",
        24,
        1024,
        (333_579_264, 334_661_958, 333_610_308),
        vocab_size=28996,
    ),
    **_with_heads(
        "bert_base_multilingual_cased",
        12,
        768,
        (177_853_440, 178_566_653, 177_974_523),
        vocab_size=119547,
    ),
    "bert_tiny_uncased": _small(2, 128, 4_385_920),
    "bert_mini_uncased": _small(4, 256, 11_170_560),
    "bert_small_uncased": _small(4, 512, 28_763_648),
    "bert_medium_uncased": _small(8, 512, 41_373_184),
    "minilm_l6_h384_uncased": _minilm(6, 384, 22_713_216),
    "minilm_l12_h384_uncased": _minilm(12, 384, 33_360_000),
    "minilm_l6_v2": _sentence(6, 384, 22_713_216, sha256=_MINILM_SHA),
    "minilm_l12_v2": _sentence(12, 384, 33_360_000),
    "bert_test": Variant(
        module=Bert,
        fields={
            "vocab_size": 97,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "mlp_dim": 64,
            "max_positions": 64,
        },
        task="text_encoding",
        paper="BERT, arXiv 1810.04805",
        code="github.com/google-research/bert",
        licence="none: no published weights",
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, frozen=(".*unused_position_embedding",))
