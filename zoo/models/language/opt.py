"""OPT: open decoders from 125 million to 175 billion parameters, after GPT-3.

Zhang et al., "OPT: Open Pre-trained Transformer Language Models", arXiv 2205.01068; official code
github.com/facebookresearch/metaseq (MIT). The weights are under the OPT-175B licence, for
non-commercial research. Published in metaseq's names and in those of Hugging Face's transformers,
whose code we follow.

    x = U E[token] + P[position]                         U only where E is narrower than the model
    x = x + attention(LN(x));   x = x + W2 relu(W1 LN(x) + b1) + b2                    (pre-norm)
    x = LN(x + attention(x));   x = LN(x + W2 relu(W1 x + b1) + b2)           (post-norm: opt_350m)
    logits = E V LN(x)                                   no LN in post-norm; V only beside U

Positions count the tokens of text only, so that padding at the left moves nothing; the published
table has two rows in front, and padding reads the second. All maps but U and V have biases. The
queries are scaled before they meet the keys, which changes rounding only. OPT starts from N(0,
0.006^2), matrices into the residual stream smaller by the root of two times the depth (the paper
and metaseq; transformers starts at 0.02).

    features            opt_125m
    embed               128  768    for 128 tokens
    layer0              128  768    up to layer11
    last_hidden_state   128  768    behind the last LayerNorm, and V where there is one
    logits              128  50272
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.scores import Score, Softmax
from zoo.checkpoints.rules import Rule, Rules, Transform, dense_rules, linear, norm_rules, tied
from zoo.layers import causal, decoder
from zoo.layers.causal import Context, causal_attention, check_tokens, continue_attention
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block
from zoo.system import File, System, Variant

OFFSET = 2
"""Rows of the table of positions before that of the first token."""

init = nn.initializers.normal(0.006)


class SeparateAttention(nn.Module):
    """Causal attention whose query, key and value are maps of their own.

    Attributes:
      num_heads: must divide the channels.
      use_bias: of the four maps.
      dropout: rate on the attention weights.
      out_init: initialiser of `out`.
      score: what is made of scores, one of `kernels_pallas.scores`.
    """

    num_heads: int
    use_bias: bool = True
    dropout: float = 0.0
    out_init: Callable = init
    score: Score = Softmax()
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
        """The attended tokens and, if there is a state, the next one."""
        batch, length, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        dense = partial(
            Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype
        )
        width = channels // self.num_heads

        def project(name: str) -> Array:
            y = dense(channels, kernel_init=init, name=name)(x)
            y = y.reshape(batch, length, self.num_heads, width)
            return constrain(y, "batch", "length", "heads", "head_dim")

        query, key, value = project("query") * width**-0.5, project("key"), project("value")
        options = {"scale": 1.0, "score": self.score}
        if state is None:
            dropping = train and self.dropout > 0
            y = causal_attention(
                query,
                key,
                value,
                context.mask,
                segments=context.segments,
                dropout=self.dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
                **options,
            )
        else:
            y, state = continue_attention(query, key, value, state, context, **options)
        out = dense(channels, kernel_init=self.out_init, name="out")
        return out(y.reshape(x.shape)), state


class OPTBlock(nn.Module):
    """Attention and an MLP, each with a LayerNorm before it or behind its residual sum.

    Attributes:
      mixer: a template; its copy is the parameter group `attention`.
      mlp_dim: width of the MLP.
      pre_norm: whether the norms stand before attention and MLP.
      activation: of the MLP.
      use_bias: of the MLP's maps.
      norm_affine: whether the norms have parameters.
      dropout: rate on both branches.
      out_init: initialiser of the matrix that writes into the residual stream.
    """

    mixer: nn.Module
    mlp_dim: int
    pre_norm: bool = True
    activation: Callable[[Array], Array] = nn.relu
    use_bias: bool = True
    norm_affine: bool = True
    dropout: float = 0.0
    out_init: Callable = init
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
        """The tokens after the block and, if there is a state, the next one."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def norm(name: str) -> nn.Module:
            return layer_norm(self.norm_affine, name, types)

        attention = self.mixer.clone(name="attention", parent=self)
        mlp = Mlp(
            self.mlp_dim,
            self.activation,
            use_bias=self.use_bias,
            kernel_init=init,
            down_init=self.out_init,
            name="mlp",
            **types,
        )
        if self.pre_norm:
            y, state = attention(norm("norm1")(x), state, train, context)
            x = constrain(x + drop(y), "batch", "length", "channels")
            x = x + drop(mlp(norm("norm2")(x)))
        else:
            y, state = attention(x, state, train, context)
            x = norm("norm1")(x + drop(y))
            x = norm("norm2")(x + drop(mlp(x)))
        return constrain(x, "batch", "length", "channels"), state


def layer_norm(affine: bool, name: str, types: dict) -> nn.Module:
    """OPT's LayerNorm, with or without parameters."""
    return LayerNorm(epsilon=1e-5, use_bias=affine, use_scale=affine, name=name, **types)


class OPT(decoder.PositionDecoder):
    """OPT language model; states and steps are those of `zoo.layers.decoder.CausalLM`.

    Attributes:
      vocab_size: tokens.
      embed_dim: channels.
      depth: blocks.
      max_positions: longest text.
      word_dim: channels of the embedding; None: as many as the model's.
      pre_norm: whether norms stand before attention and MLP.
      final_norm: whether a pre-norm model has a norm at its end (old fine-tuned ones have none).
      activation: of the MLP, a key of `zoo.layers.mlp.ACTIVATIONS`.
      use_bias: whether attention and MLP have biases.
      norm_affine: whether norms have parameters.
      tie_embeddings: read the logits off the embedding; otherwise off a matrix `head`.
      score: what attention makes of scores, one of `kernels_pallas.scores`.
      dropout: rate on both branches of a block.
      attention_dropout: rate on attention weights.
      scan_layers: one stacked `layers` instead of `layers_0 ...`, compiled once
        (`zoo.layers.stack` converts the parameters); without states.
      remat: recompute layers in the backward pass instead of keeping their activations; True, or
        what is kept nevertheless, by `zoo.layers.stack.REMAT`.
    """

    vocab_size: int = 50272
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 2048
    word_dim: int | None = None
    pre_norm: bool = True
    final_norm: bool = True
    activation: str = "relu"
    use_bias: bool = True
    norm_affine: bool = True
    tie_embeddings: bool = True
    score: Score = Softmax()
    dropout: float = 0.1
    attention_dropout: float = 0.0
    scan_layers: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Array | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
        segments: Int[Array, "batch length"] | None = None,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); arguments as those of `__call__`."""
        tokens, mask = check_tokens(self, tokens, mask, positions)
        if positions is None and segments is not None:
            positions = causal.positions_in(segments)
        elif positions is None and mask is not None:
            positions = jnp.where(mask, causal.positions_of(mask), -1)
        context = Context(mask, positions, segments=segments)
        return self._run(tokens, None, train, context)[0]

    @nn.compact
    def _run(
        self, tokens: Array, state: tuple | None, train: bool, context: Context
    ) -> tuple[dict[str, Array], tuple | None]:
        self.check(state)
        length = tokens.shape[1]
        self.check_length(length)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        word_dim = self.word_dim or self.embed_dim
        project = partial(Dense, use_bias=False, kernel_init=init, **types)
        embed = nn.Embed(self.vocab_size, word_dim, embedding_init=init, name="embed", **types)
        x = embed(tokens)
        if word_dim != self.embed_dim:
            x = project(self.embed_dim, name="project_in")(x)
        shape = (self.max_positions + OFFSET, self.embed_dim)
        table = self.param("position_embedding", init, shape, self.param_dtype)
        if context.positions is None:
            at = table[OFFSET : OFFSET + length]
        else:
            rows = context.positions + OFFSET
            at = jnp.take(table, rows, axis=0, mode="fill", fill_value=jnp.nan)
        x = constrain(x + at.astype(self.dtype), "batch", "length", "channels")
        out = {"embed": x}
        out_init = nn.initializers.normal(0.006 / (2 * self.depth) ** 0.5)
        attention = SeparateAttention(
            self.num_heads,
            self.use_bias,
            self.attention_dropout,
            out_init,
            self.score,
            parent=None,
            **types,
        )
        block = partial(
            remat_block(OPTBlock, self.remat, static_argnums=(3,), scanned=self.scan_layers),
            attention,
            self.mlp_dim,
            self.pre_norm,
            ACTIVATIONS[self.activation],
            self.use_bias,
            self.norm_affine,
            self.dropout,
            out_init,
            **types,
        )
        scan = self.depth if self.scan_layers else 0
        every, state = decoder.run_blocks([block] * self.depth, x, state, train, context, scan=scan)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        x = every[-1] if every else x
        if self.pre_norm and self.final_norm:
            x = layer_norm(self.norm_affine, "norm", types)(x)
        if word_dim != self.embed_dim:
            x = project(word_dim, name="project_out")(x)
        out["last_hidden_state"] = x
        out["logits"] = decoder.read_out(self, embed, x, context)
        return out, state


# ---------------------------------------------------------------------------- checkpoints


def _fused(xs: list[np.ndarray]) -> list[np.ndarray]:
    """Query, key and value of metaseq's rows, which are key, value, query."""
    key, value, query = np.split(xs[0], 3, axis=0)
    return [query, key, value]


def _kvq(turn: Callable[[np.ndarray], np.ndarray]) -> Transform:
    return Transform(
        lambda xs: [turn(x) for x in _fused(xs)],
        lambda xs: [np.concatenate([turn(xs[1]), turn(xs[2]), turn(xs[0])])],
    )


def _layout(
    prefix: str = "model.decoder.", *, head: str = "", metaseq: bool = False, fused: bool = False
) -> Rules:
    """Rules of one published naming.

    Args:
      prefix: of the names.
      head: the second name of the embedding, where the file has one.
      metaseq: whether the last norm and the projections have metaseq's names.
      fused: whether key, value and query are one matrix, in this order.
    """
    theirs, ours = f"{prefix}layers.{{i}}", "layers_{i}"
    table, suffix = f"{prefix}embed_tokens.weight", "_dim" if metaseq else ""
    rules = [
        Rule(head or "lm_head.weight", "head/kernel", linear),
        Rule("score.weight", "class_head/kernel", linear),
    ]
    if head:
        rules.append(Rule((table, head), "embed/embedding", tied))
    rules += [
        Rule(table, "embed/embedding"),
        Rule(f"{prefix}embed_positions.weight", "position_embedding"),
        Rule(f"{prefix}project_in{suffix}.weight", "project_in/kernel", linear),
        Rule(f"{prefix}project_out{suffix}.weight", "project_out/kernel", linear),
        *norm_rules(f"{prefix}{'layer_norm' if metaseq else 'final_layer_norm'}", "norm"),
        *norm_rules(f"{theirs}.self_attn_layer_norm", f"{ours}/norm1"),
        *norm_rules(f"{theirs}.final_layer_norm", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.self_attn.out_proj", f"{ours}/attention/out"),
        *dense_rules(f"{theirs}.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.fc2", f"{ours}/mlp/down"),
    ]
    names = ("query", "key", "value")
    if fused:
        for a, b, turn in (("weight", "kernel", np.transpose), ("bias", "bias", np.asarray)):
            targets = tuple(f"{ours}/attention/{name}/{b}" for name in names)
            rules.append(Rule(f"{theirs}.self_attn.qkv_proj.{a}", targets, _kvq(turn)))
    else:
        for a, b in zip("qkv", names, strict=True):
            rules += dense_rules(f"{theirs}.self_attn.{a}_proj", f"{ours}/attention/{b}")
    return Rules(
        rules,
        derived={f"{prefix}version": None},
        unused=("score.weight",),
        fresh=("head/kernel", "class_head/kernel"),
    )


LAYOUTS = {
    "huggingface": _layout(),
    "huggingface_torch": _layout(head="lm_head.weight"),
    "decoder": _layout("decoder."),
    "trunk": _layout(""),
    "metaseq": _layout(
        "decoder.", head="decoder.output_projection.weight", metaseq=True, fused=True
    ),
    "metaseq_separate": _layout("decoder.", head="decoder.output_projection.weight", metaseq=True),
}

_COMMON = dict(
    module=OPT,
    task="language_modelling",
    paper="OPT: Open Pre-trained Transformer Language Models, arXiv 2205.01068",
    code="github.com/facebookresearch/metaseq",
    licence="OPT-175B licence (non-commercial research)",
    files=(File("pytorch_model.bin"), File("model.safetensors"), File("reshard-model_part-0.pt")),
)


def _size(depth: int, embed_dim: int, num_heads: int, **fields: Any) -> dict[str, Any]:
    return dict(
        depth=depth, embed_dim=embed_dim, num_heads=num_heads, mlp_dim=4 * embed_dim, **fields
    )


VARIANTS: dict[str, Variant] = {
    "opt_125m": Variant(fields=_size(12, 768, 12), params=125_239_296, **_COMMON),
    "opt_350m": Variant(
        fields=_size(24, 1024, 16, word_dim=512, pre_norm=False), params=331_196_416, **_COMMON
    ),
    "opt_1.3b": Variant(fields=_size(24, 2048, 32), params=1_315_758_080, **_COMMON),
    "opt_2.7b": Variant(fields=_size(32, 2560, 32), params=2_651_596_800, **_COMMON),
    "opt_6.7b": Variant(fields=_size(32, 4096, 32), params=6_658_473_984, **_COMMON),
    "opt_13b": Variant(fields=_size(40, 5120, 40), params=12_853_473_280, **_COMMON),
    "opt_30b": Variant(fields=_size(48, 7168, 56), params=29_974_540_288, **_COMMON),
    "opt_66b": Variant(fields=_size(64, 9216, 72), params=65_719_701_504, **_COMMON),
    "opt_175b": Variant(fields=_size(96, 12288, 96), params=174_604_468_224, **_COMMON),
    "opt_test": Variant(
        fields=dict(
            vocab_size=97, embed_dim=32, depth=2, num_heads=4, mlp_dim=64, max_positions=64,
            word_dim=24,
        ),
        **_COMMON | dict(licence="none: no published weights", files=()),
    ),
}  # fmt: skip

PARTITION = {
    r"project_in/kernel": ("channels", "mlp"),
    r"project_out/kernel": ("mlp", "channels"),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
