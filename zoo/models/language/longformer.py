"""Longformer: an encoder for long texts, of sliding windows and a few tokens that see everything.

Beltagy, Peters and Cohan, "Longformer: The Long-Document Transformer", arXiv 2004.05150; official
code github.com/allenai/longformer (Apache-2.0). Its weights are used in the form of Hugging Face's
transformers, whose names and numbers we follow. The encoder is RoBERTa's (LayerNorm behind each
residual sum), with another attention. With a window of w keys and the set G of global tokens:

    i not in G:  softmax over { j : |i - j| <= w/2 } and G, each key once, of q_i . k_j / sqrt(d)
    i in G:      softmax over all j of q'_i . k'_j / sqrt(d), times v'_j

The second line has maps of its own: `query_global`, `key_global`, `value_global`.
Keys of padding are seen by nobody, and attention gives zeros there. Positions are learned; a token
has number `pad_token + (how many tokens that are no padding stand up to it)`. The window's part
and the global tokens' part are two calls of the kernel, joined by their log-sum-exps; its cost is
linear in the length. The authors' language models have windows that look back only (`causal`) and
gaps between the keys (`dilation`), which transformers leaves out.

    features            longformer_base_4096
    embeddings          512  768    for 512 tokens
    layer0              512  768    up to layer11
    last_hidden_state   512  768    the last of them
    pooled                   768
    logits              512  768    without a head: the last hidden states
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, Transform, dense_rules, norm_rules, tied
from zoo.layers.causal import check_tokens, check_zero_or_one
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block
from zoo.models.language.bert import ACTIVATIONS, MaskedLMHead
from zoo.system import File, System, Variant

init = nn.initializers.normal(0.02)

Heads = Float[Array, "batch length heads head_dim"]


def window_mask(window: int, dilation: int = 1, causal: bool = False) -> kernels_pallas.masks.Mask:
    """The keys that a local token sees: `window / 2` on each side, or before it, and itself."""
    left, right = window // 2, 0 if causal else window // 2
    if dilation == 1:
        return kernels_pallas.SlidingWindow(left, right)
    return kernels_pallas.Dilated(left, right, dilation)


def merge(
    first: tuple[Heads, Float[Array, "batch heads length"]],
    second: tuple[Heads, Float[Array, "batch heads length"]],
) -> Heads:
    """Softmax attention over two disjoint sets of keys, from output and log-sum-exp of each."""
    (a, lse_a), (b, lse_b) = first, second
    share = jax.nn.sigmoid(lse_a - lse_b).swapaxes(1, 2)[..., None].astype(a.dtype)
    return share * a + (1 - share) * b


def first_places(
    chosen: Bool[Array, "batch length"], slots: int
) -> tuple[Int[Array, "batch slots"], Bool[Array, "batch slots"]]:
    """Where the first `slots` chosen tokens stand, and which slots hold one."""
    places = jnp.argsort(~chosen, axis=1, stable=True)[:, :slots]
    return places, jnp.take_along_axis(chosen, places, axis=1)


class LongformerAttention(nn.Module):
    """Windowed attention with global tokens, and its maps.

    Attributes:
      num_heads: must divide the channels.
      mask: what local tokens see of each other.
      max_global: room for global tokens; None: for as many as there are tokens.
      dropout: rate on the weights.
    """

    num_heads: int
    mask: Callable
    max_global: int | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch length"],
        is_global: Bool[Array, "batch length"] | None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """Attend; `visible` is False at padding, `is_global` None where no token is global."""
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name: str, x: Array) -> Heads:
            y = Dense(channels, kernel_init=init, name=name, **types)(x)
            y = y.reshape(*x.shape[:2], self.num_heads, -1)
            return constrain(y, "batch", "length", "heads", "head_dim")

        def attend(query: Heads, key: Heads, value: Heads, seen: Array, mask=None) -> tuple:
            dropping = train and self.dropout > 0
            return kernels_pallas.attention(
                query,
                key,
                value,
                mask=mask,
                query_segments=jnp.ones(query.shape[:2], jnp.int32),
                key_segments=seen.astype(jnp.int32),
                dropout=self.dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
                return_lse=True,
            )

        query, key, value = (project(name, x) for name in ("query", "key", "value"))
        if is_global is None and not self.is_initializing():
            y, _ = attend(query, key, value, visible, self.mask)
        else:
            chosen = jnp.zeros_like(visible) if is_global is None else is_global & visible
            slots = min(x.shape[1], self.max_global or x.shape[1])
            places, held = first_places(chosen, slots)

            def take(t: Array) -> Array:
                return jnp.take_along_axis(t, places.reshape(*places.shape, *[1] * (t.ndim - 2)), 1)

            window = attend(query, key, value, visible & ~chosen, self.mask)
            y = merge(window, attend(query, take(key), take(value), held))
            every, _ = attend(
                project("query_global", take(x)),
                project("key_global", x),
                project("value_global", x),
                visible,
            )
            slot = jnp.clip(jnp.cumsum(chosen, 1) - 1, 0, slots - 1)[:, :, None, None]
            y = jnp.where(chosen[:, :, None, None], jnp.take_along_axis(every, slot, 1), y)
            y = jnp.where((chosen.sum(1) > slots)[:, None, None, None], jnp.nan, y)
        y = jnp.where(visible[:, :, None, None], y, 0).reshape(x.shape)
        return Dense(channels, kernel_init=init, name="out", **types)(y)


class LongformerLayer(nn.Module):
    """Attention and MLP, each with a LayerNorm behind its residual sum."""

    mixer: LongformerAttention  # a template: its copy has the parameters
    mlp_dim: int
    activation: Callable[[Array], Array]
    epsilon: float
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch length"],
        is_global: Bool[Array, "batch length"] | None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = self.mixer.clone(name="attention", parent=self)
        x = norm(name="norm1")(x + drop(attention(x, visible, is_global, train)))
        mlp = Mlp(self.mlp_dim, self.activation, kernel_init=init, name="mlp", **types)
        x = norm(name="norm2")(x + drop(mlp(x)))
        return constrain(x, "batch", "length", "channels")


class Longformer(Model):
    """Longformer encoder, with or without a head.

    Attributes:
      window: keys of a window, the token itself not counted: even; one number, or one a layer.
      dilation: distance of two keys of a window; one number, or one a layer.
      causal: windows look back only, and no token is global.
      max_global: room for global tokens in an example: the most that cost anything. An example
        with more gives NaN. None: as many as there are tokens.
      max_positions: rows of the position table; `pad_token + 1` of them are not for tokens.
      pad_token: number of the padding word, which sets the positions.
      sep_token: ends the question, for `question_answering` without a global mask.
      activation: of the MLP, a key of `zoo.models.language.bert.ACTIVATIONS`.
      pooler: the tanh layer on the first token.
      head: None, "masked_lm", "classification", "token_classification" or "question_answering".
      num_classes: of the classification heads.
      remat: recompute layers in the backward pass instead of keeping their activations; True, or
        what is kept nevertheless, by `zoo.layers.stack.REMAT`.
    """

    vocab_size: int = 50265
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    window: int | tuple[int, ...] = 512
    dilation: int | tuple[int, ...] = 1
    causal: bool = False
    max_global: int | None = 256
    max_positions: int = 4098
    num_token_types: int = 1
    pad_token: int = 1
    sep_token: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-5
    pooler: bool = True
    head: str | None = None
    num_classes: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 512
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        length = min(length, self.max_positions - self.pad_token - 1)
        shape = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        masks = {"mask": shape} if self.causal else {"mask": shape, "global_mask": shape}
        return {"tokens": shape, **masks}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        global_mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        token_types: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Array:
        """What the head gives; without one, the last hidden states.

        Args:
          tokens: numbers of words.
          mask: 0 or False for padding; None is no padding.
          global_mask: 1 or True for tokens that see all and that all see. None: none, but the first
            token for `classification`, and the question for `question_answering`.
          token_types: segment of each token; None is 0 everywhere.
          positions: rows of the position table; None: counted over what is no padding.
          train: whether to drop out.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        out = self.features(tokens, mask, global_mask, token_types, positions, train)
        return out["logits"]

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        global_mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        token_types: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); arguments as those of `__call__`."""
        optional = {"mask": mask, "global_mask": global_mask, "token_types": token_types,
                    "positions": positions}  # fmt: skip
        self._check(tokens, optional)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        if positions is None:
            real = (tokens != self.pad_token).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + self.pad_token
        x = embed(tokens) + self._row("position_embedding", self.max_positions, positions)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        x = x + self._row("token_type_embedding", self.num_token_types, token_types)
        x = LayerNorm(epsilon=self.epsilon, name="embed_norm", **types)(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = constrain(x, "batch", "length", "channels")
        out = {"embeddings": x}

        visible = jnp.ones(tokens.shape, bool) if mask is None else mask != 0
        is_global = self._global(tokens, global_mask)
        layer = remat_block(LongformerLayer, self.remat, static_argnums=(4,))
        for i in range(self.depth):
            window, dilation = self._of_layer("window", i), self._of_layer("dilation", i)
            attention = LongformerAttention(
                self.num_heads,
                window_mask(window, dilation, self.causal),
                self.max_global,
                self.attention_dropout,
                parent=None,
                **types,
            )
            act = ACTIVATIONS[self.activation]
            x = layer(
                attention,
                self.mlp_dim,
                act,
                self.epsilon,
                self.dropout,
                name=f"layers_{i}",
                **types,
            )(x, visible, is_global, train)
            out[f"layer{i}"] = x
        out["last_hidden_state"] = out["logits"] = x
        if self.pooler:
            dense = Dense(self.embed_dim, kernel_init=init, name="pooler", **types)
            out["pooled"] = jnp.tanh(dense(x[:, 0]))
        if self.head is not None:
            out["logits"] = self._read(x, embed, train)
        return out

    def _row(self, name: str, rows: int, index: Array) -> Array:
        table = self.param(name, init, (rows, self.embed_dim), self.param_dtype)
        return jnp.take(table.astype(self.dtype), index, axis=0, mode="fill", fill_value=jnp.nan)

    def _of_layer(self, field: str, i: int) -> int:
        value = getattr(self, field)
        return value if isinstance(value, int) else value[i]

    def _global(self, tokens: Array, global_mask: Array | None) -> Array | None:
        if global_mask is not None:
            return global_mask != 0
        at = jnp.arange(tokens.shape[1])
        if self.head == "classification":
            return jnp.broadcast_to(at == 0, tokens.shape)
        if self.head == "question_answering":
            return at < jnp.argmax(tokens == self.sep_token, axis=1, keepdims=True)
        return None

    def _read(self, x: Array, embed: nn.Embed, train: bool) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        dense = partial(Dense, kernel_init=init, **types)
        if self.head == "masked_lm":
            read = MaskedLMHead(self.vocab_size, epsilon=self.epsilon, name="predictions", **types)
            return read(x, embed.attend)
        if self.head == "question_answering":
            return dense(2, name="span_head")(x)
        if self.head == "token_classification":
            return dense(self.num_classes, name="token_head")(drop(x))
        x = jnp.tanh(dense(self.embed_dim, name="head_transform")(drop(x[:, 0])))
        return dense(self.num_classes, name="head")(drop(x))

    def _check(self, tokens: Array, optional: dict[str, Array | None]) -> None:
        check_tokens(self, tokens)
        check_zero_or_one(optional.get("mask"))
        room = self.max_positions - self.pad_token - 1
        if tokens.shape[1] > room:
            raise ValueError(
                f"This Longformer reads at most {room} tokens, not {tokens.shape[1]}; cut the "
                "text, or create the model with more max_positions."
            )
        for name, value in optional.items():
            if value is not None and value.shape != tokens.shape:
                raise ValueError(
                    f"{name} has shape {value.shape}; it should be that of tokens, {tokens.shape}."
                )
        if self.causal and self.head in ("classification", "question_answering"):
            raise ValueError(f"head={self.head!r} makes tokens global; causal=True has none.")
        if self.causal and optional["global_mask"] is not None:
            raise ValueError("causal=True has no global tokens; leave out global_mask.")
        for field in ("window", "dilation"):
            values = getattr(self, field)
            values = (values,) * self.depth if isinstance(values, int) else values
            if len(values) != self.depth or any(v < 1 for v in values):
                raise ValueError(
                    f"{field}={values} should be one positive number for each of {self.depth} "
                    "layers."
                )
            if field == "window" and any(v % 2 for v in values):
                raise ValueError(f"window={values} should be even: half of it lies on each side.")
        for field, known in (("activation", tuple(ACTIVATIONS)), ("head", HEADS)):
            if getattr(self, field) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {names}.")


HEADS = (None, "masked_lm", "classification", "token_classification", "question_answering")

# ---------------------------------------------------------------------------- checkpoints


def _tied_pairs(xs: list) -> list:
    return [*tied.forward([xs[0], xs[2]]), *tied.forward([xs[1], xs[3]])]


def _layout(prefix: str = "", *, repeated: bool = False) -> Rules:
    """Rules of one published naming.

    Args:
      prefix: of the encoder's names: empty in a file of the encoder alone.
      repeated: whether the word head's decoder repeats the embedding and the bias.
    """
    theirs, ours = f"{prefix}encoder.layer.{{i}}", "layers_{i}"
    words = f"{prefix}embeddings.word_embeddings.weight"
    both = (words, "lm_head.bias", "lm_head.decoder.weight", "lm_head.decoder.bias")
    heads = [
        *(
            [Rule(both, ("embed/embedding", "predictions/bias"),
                  Transform(_tied_pairs, lambda xs: [*xs, *xs]))] if repeated else []
        ),
        Rule("lm_head.bias", "predictions/bias"),
        *dense_rules("lm_head.dense", "predictions/transform"),
        *norm_rules("lm_head.layer_norm", "predictions/norm"),
        *dense_rules("classifier.dense", "head_transform"),
        *dense_rules("classifier.out_proj", "head"),
        *dense_rules("classifier", "token_head"),
        *dense_rules("qa_outputs", "span_head"),
    ]  # fmt: skip
    maps = ("query", "key", "value", "query_global", "key_global", "value_global")
    encoder = [
        Rule(words, "embed/embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "position_embedding"),
        Rule(f"{prefix}embeddings.token_type_embeddings.weight", "token_type_embedding"),
        *norm_rules(f"{prefix}embeddings.LayerNorm", "embed_norm"),
        *(
            rule
            for name in maps
            for rule in dense_rules(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}")
        ),
        *dense_rules(f"{theirs}.attention.output.dense", f"{ours}/attention/out"),
        *norm_rules(f"{theirs}.attention.output.LayerNorm", f"{ours}/norm1"),
        *dense_rules(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.output.dense", f"{ours}/mlp/down"),
        *norm_rules(f"{theirs}.output.LayerNorm", f"{ours}/norm2"),
        *dense_rules(f"{prefix}pooler.dense", "pooler"),
    ]
    return Rules(
        (*heads, *encoder) if prefix else encoder,
        derived={f"{prefix}embeddings.position_ids": None},
        unused=(
            f"{prefix}pooler.dense.*",
            *(("lm_head.*", "classifier.*", "qa_outputs.*") if prefix else ()),
        ),
        fresh=("*head/*", "head_transform/*", "predictions/*", "pooler/*"),
    )


LAYOUTS = {
    "huggingface": _layout(),
    "huggingface_heads": _layout("longformer."),
    "huggingface_heads_torch": _layout("longformer.", repeated=True),
}

# ------------------------------------------------------------------------------- variants

PARTITION = {
    r".*(query|key|value)_global/kernel": ("channels", "heads"),
    r".*(query|key|value)_global/bias": ("heads",),
}

_COMMON = dict(
    module=Longformer,
    paper="Longformer, arXiv 2004.05150",
    code="github.com/allenai/longformer",
    licence="Apache-2.0",
)
_FILES = dict(files=(File("pytorch_model.bin"),))
_LARGE = dict(embed_dim=1024, depth=24, num_heads=16, mlp_dim=4096)

VARIANTS: dict[str, Variant] = {
    "longformer_base_4096": Variant(
        fields={}, task="text_encoding", params=148_659_456, **_COMMON, **_FILES,
    ),
    "longformer_base_4096_mlm": Variant(
        fields=dict(head="masked_lm", pooler=False), task="masked_language_modelling",
        params=148_711_257, **_COMMON, **_FILES,
    ),
    "longformer_large_4096": Variant(
        fields=_LARGE, task="text_encoding", params=434_600_960, **_COMMON, **_FILES,
    ),
    "longformer_large_4096_triviaqa": Variant(
        fields=_LARGE | dict(head="question_answering", pooler=False), task="question_answering",
        params=433_553_410, **_COMMON, **_FILES,
    ),
    "longformer_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, mlp_dim=64, window=8,
                    max_positions=66, pooler=False),
        task="text_encoding", **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
