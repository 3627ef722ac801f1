"""GPT-2: the causal transformer that later language models are measured by.

Radford et al., "Language Models are Unsupervised Multitask Learners", OpenAI 2019. Official code
github.com/openai/gpt-2 (modified MIT); its weights are used in the form of Hugging Face's
transformers, whose names we follow. DistilGPT2 is Sanh et al., arXiv 1910.01108.

    x = E[token] + P[position]
    x = x + attention(LN(x));   x = x + W2 gelu(W1 LN(x) + b1) + b2        causal; `depth` times
    logits = E LN(x)                                                       the embedding, no bias

With `cross_attention` each block also attends to a memory between the two, behind a LayerNorm of
its own: x = x + attention(LN(x), memory).

`mask` hides padding at either side. Positions are 0, 1, ... with it, too, as in transformers; give
`positions_of(mask)` where a padded text shall be what it is alone (`step` and `zoo.inference` do).

The GELU is the tanh form. All maps have biases. Matrices start at N(0, 0.02^2), those that write
into the residual stream smaller by sqrt(2 depth), as the paper says; the released code does not
scale them, and starts P at 0.01. Published matrices are `[in, out]` (transformers' Conv1D), and
c_attn holds query, key and value side by side.

    features            gpt2
    embed               128  768    for 128 tokens
    layer0              128  768    up to layer11
    last_hidden_state   128  768    behind the last LayerNorm
    logits              128  50257
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, linear, norm_rules, split, tied
from zoo.layers import decoder
from zoo.layers.attention import Attention
from zoo.layers.causal import (
    Context,
    causal_attention,
    check_memory,
    check_tokens,
    continue_attention,
    positions_in,
)
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block
from zoo.system import File, System, Variant

init = nn.initializers.normal(0.02)


def residual_init(depth: int) -> Callable:
    """How the matrices start that write into the residual stream of `depth` blocks."""
    return nn.initializers.normal(0.02 / (2 * depth) ** 0.5)


class CausalAttention(nn.Module):
    """Each token attends to itself and to those before it.

    Attributes:
      num_heads: must divide the channels.
      dropout: rate on the attention weights.
      kernel_init: initialiser of `qkv`.
      out_init: initialiser of `out`.
      scale: of the scores; None: one over the root of a head's width.
      use_bias: whether the maps have biases.
    """

    num_heads: int
    dropout: float = 0.0
    kernel_init: Callable = init
    out_init: Callable = init
    scale: float | None = None
    use_bias: bool = True
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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = (batch, length, self.num_heads, channels // self.num_heads)
        maps = {"use_bias": self.use_bias, **types}
        qkv = Dense(3 * channels, kernel_init=self.kernel_init, name="qkv", **maps)(x)
        query, key, value = (
            constrain(t.reshape(heads), "batch", "length", "heads", "head_dim")
            for t in jnp.split(qkv, 3, axis=-1)
        )
        if state is None:
            dropping = train and self.dropout > 0
            y = causal_attention(
                query,
                key,
                value,
                context.mask,
                segments=context.segments,
                scale=self.scale,
                dropout=self.dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
            )
        else:
            y, state = continue_attention(query, key, value, state, context, scale=self.scale)
        out = Dense(channels, kernel_init=self.out_init, name="out", **maps)
        return out(y.reshape(x.shape)), state


class GPT2Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and with a residual sum.

    Attributes:
      num_heads: must divide the channels.
      dropout: rate on the attention weights and on both branches.
      out_init: initialiser of the two matrices that write into the residual stream.
      mlp_dim: width of the MLP; None: four times the channels.
      activation: of the MLP.
      scale: see `CausalAttention`.
      use_bias: whether maps and norms have biases.
      epsilon: of the norms.

    Where the context has a memory, there is a second attention, to that.
    """

    num_heads: int
    dropout: float = 0.0
    out_init: Callable = init
    mlp_dim: int | None = None
    activation: Callable[[Array], Array] = ACTIVATIONS["gelu_new"]
    scale: float | None = None
    use_bias: bool = True
    epsilon: float = 1e-5
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
        norm = partial(LayerNorm, epsilon=self.epsilon, use_bias=self.use_bias, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = CausalAttention(
            self.num_heads,
            self.dropout,
            init,
            self.out_init,
            self.scale,
            self.use_bias,
            name="attention",
            **types,
        )
        y, state = attention(norm(name="norm1")(x), state, train, context)
        x = constrain(x + drop(y), "batch", "length", "channels")
        if context.memory is not None:
            cross = Attention(
                self.num_heads,
                fused=False,
                qkv_bias=self.use_bias,
                out_bias=self.use_bias,
                scale=self.scale,
                attention_dropout=self.dropout,
                blind="mean",
                kernel_init=init,
                name="cross_attention",
                **types,
            )
            y = norm(name="cross_norm")(x)
            x = x + drop(cross(y, context.memory_visible, train, context.memory))
        mlp = Mlp(
            self.mlp_dim or 4 * x.shape[-1],
            self.activation,
            use_bias=self.use_bias,
            kernel_init=init,
            down_init=self.out_init,
            name="mlp",
            **types,
        )
        x = x + drop(mlp(norm(name="norm2")(x)))
        return constrain(x, "batch", "length", "channels"), state


class GPT2(decoder.PositionDecoder):
    """GPT-2 language model.

    `init_state(batch, length)` and `step(state, tokens)` (through `apply(..., method="step")`) give
    the same logits token by token, or piece by piece, as a call on the whole sequence.

    Attributes:
      vocab_size: tokens.
      embed_dim: channels.
      depth: blocks.
      max_positions: longest sequence. Positions that a call does not give are 0, 1, ... whether
        there is padding or not.
      mlp_dim: width of the MLP; None: four times the channels.
      activation: of the MLP, a key of `zoo.layers.mlp.ACTIVATIONS`.
      scale_attention: whether scores are divided by the root of a head's width.
      scale_by_layer: whether those of layer i are also divided by i + 1 (Mistral's GPT-2).
      cross_attention: blocks also look at the `memory` that a call gives, such as the hidden states
        of an encoder; without one this is passed over. To step with one, put `memory` and
        `memory_visible` into the state.
      tie_embeddings: read the logits off the embedding; otherwise off a matrix `head`.
      use_bias: whether maps and norms have biases; nanoGPT trains without.
      epsilon: of the norms.
      dropout: rate on embeddings, attention weights and both branches of a block.
      scan_layers: one stacked `layers` instead of `layers_0 ...`, compiled once
        (`zoo.layers.stack` converts the parameters); without states.
      remat: recompute layers in the backward pass instead of keeping their activations; True, or
        what is kept nevertheless, by `zoo.layers.stack.REMAT`.
    """

    vocab_size: int = 50257
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    max_positions: int = 1024
    mlp_dim: int | None = None
    activation: str = "gelu_new"
    scale_attention: bool = True
    scale_by_layer: bool = False
    cross_attention: bool = False
    tie_embeddings: bool = True
    use_bias: bool = True
    epsilon: float = 1e-5
    dropout: float = 0.1
    scan_layers: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        inputs = super().example_inputs(batch_size, length)
        if self.cross_attention:
            shape = (*inputs["tokens"].shape, self.embed_dim)
            inputs["memory"] = jax.ShapeDtypeStruct(shape, self.dtype)
        return inputs

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Array | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
        segments: Int[Array, "batch length"] | None = None,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Array | None = None,
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits of the next token at each position.

        Arguments are those of `PositionDecoder`, and with `cross_attention` the `memory` with its
        mask: 1 or True for what of it is there; None is all.
        """
        more = {"memory": memory, "memory_mask": memory_mask}
        return self.features(tokens, mask, positions, train, segments, **more)["logits"]

    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Array | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
        segments: Int[Array, "batch length"] | None = None,
        token_types: Int[Array, "batch length"] | None = None,
        memory: Float[Array, "batch keys channels"] | None = None,
        memory_mask: Array | None = None,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); arguments as those of `__call__`.

        Beside them: `token_types`, tokens whose embeddings mark the parts of a text, such as its
        speakers (as in transformers); None: nothing is added.
        """
        tokens, mask = check_tokens(self, tokens, mask, positions)
        check_memory(self, tokens, memory, memory_mask, optional=True)
        if positions is None and segments is not None:
            positions = positions_in(segments)
        context = Context(
            mask,
            positions,
            segments=segments,
            memory=memory,
            memory_visible=None if memory_mask is None else memory_mask != 0,
        )
        return self._run(tokens, None, train, context, token_types)[0]

    @nn.compact
    def _run(
        self,
        tokens: Array,
        state: tuple | None,
        train: bool,
        context: Context,
        token_types: Array | None = None,
    ) -> tuple[dict[str, Array], tuple | None]:
        if self.scan_layers and self.scale_by_layer:
            raise ValueError("scale_by_layer=True makes layers differ; use scan_layers=False.")
        self.check(state)
        length = tokens.shape[1]
        self.check_length(length)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        shape = (self.max_positions, self.embed_dim)
        table = self.param("position_embedding", init, shape, self.param_dtype)
        if context.positions is None:
            at = table[:length]
        else:
            at = jnp.take(table, context.positions, axis=0, mode="fill", fill_value=jnp.nan)
        x = embed(tokens) + at.astype(self.dtype)
        x = x if token_types is None else x + embed(token_types)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = constrain(x, "batch", "length", "channels")
        out = {"embed": x}
        block = partial(
            remat_block(GPT2Block, self.remat, static_argnums=(3,), scanned=self.scan_layers),
            self.num_heads,
            self.dropout,
            residual_init(self.depth),
            mlp_dim=self.mlp_dim,
            activation=ACTIVATIONS[self.activation],
            use_bias=self.use_bias,
            epsilon=self.epsilon,
            **types,
        )
        blocks = [partial(block, scale=self._scale(i)) for i in range(self.depth)]
        scan = self.depth if self.scan_layers else 0
        every, state = decoder.run_blocks(blocks, x, state, train, context, scan=scan)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        norm = LayerNorm(epsilon=self.epsilon, use_bias=self.use_bias, name="norm", **types)
        x = out["last_hidden_state"] = norm(every[-1] if every else x)
        out["logits"] = decoder.read_out(self, embed, x, context)
        return out, state

    def _scale(self, layer: int) -> float | None:
        """The factor on the scores of a layer; None: the usual one."""
        if self.scale_attention and not self.scale_by_layer:
            return None
        width = self.embed_dim // self.num_heads
        scale = width**-0.5 if self.scale_attention else 1.0
        return scale / (layer + 1) if self.scale_by_layer else scale


# ---------------------------------------------------------------------------- checkpoints


def conv1d_rules(theirs: str, ours: str) -> list[Rule]:
    """The two rules of a map that is published as `[in, out]`."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def trunk_rules(
    prefix: str = "", qkv: str = "c_attn", maps: Callable[[str, str], list[Rule]] = conv1d_rules
) -> list[Rule]:
    """Rules of a GPT-2 without its head.

    Args:
      prefix: of all names.
      qkv: name of the fused map within `attn`.
      maps: the rules of a linear map of their name and ours.
    """
    theirs, ours = f"{prefix}h.{{i}}", "layers_{i}"
    return [
        Rule(f"{prefix}wte.weight", "embed/embedding"),
        Rule(f"{prefix}wpe.weight", "position_embedding"),
        *norm_rules(f"{theirs}.ln_1", f"{ours}/norm1"),
        *maps(f"{theirs}.attn.{qkv}", f"{ours}/attention/qkv"),
        *maps(f"{theirs}.attn.c_proj", f"{ours}/attention/out"),
        *norm_rules(f"{theirs}.ln_2", f"{ours}/norm2"),
        *maps(f"{theirs}.mlp.c_fc", f"{ours}/mlp/up"),
        *maps(f"{theirs}.mlp.c_proj", f"{ours}/mlp/down"),
        *norm_rules(f"{prefix}ln_f", "norm"),
    ]


def _causal_mask(model: GPT2, i: int) -> np.ndarray:
    side = model.max_positions
    return np.tril(np.ones((side, side), np.float32))[None, None]


def _layout(
    prefix: str,
    *,
    masks: bool = False,
    head: str = "",
    maps: Callable[[str, str], list[Rule]] = conv1d_rules,
) -> Rules:
    """Rules of one published naming.

    Args:
      prefix: of the names.
      masks: whether export writes the causal mask of every block, as old files have it.
      head: the second name of the embedding, where the file has one.
      maps: the rules of a linear map.
    """
    both, theirs, ours = (f"{prefix}wte.weight", head), f"{prefix}h.{{i}}", "layers_{i}"
    untied = head or "lm_head.weight"
    return Rules(
        [
            Rule(untied, "head/kernel", linear),
            Rule("score.weight", "class_head/kernel", linear),
            *([Rule(both, "embed/embedding", tied)] if head else []),
            *trunk_rules(prefix, maps=maps),
            *norm_rules(f"{theirs}.ln_cross_attn", f"{ours}/cross_norm"),
            *maps(f"{theirs}.crossattention.q_attn", f"{ours}/cross_attention/query"),
            Rule(
                f"{theirs}.crossattention.c_attn.weight",
                tuple(f"{ours}/cross_attention/{name}/kernel" for name in ("key", "value")),
                split(1),
            ),
            Rule(
                f"{theirs}.crossattention.c_attn.bias",
                tuple(f"{ours}/cross_attention/{name}/bias" for name in ("key", "value")),
                split(0),
            ),
            *maps(f"{theirs}.crossattention.c_proj", f"{ours}/cross_attention/out"),
        ],
        derived={
            f"{theirs}.crossattention.bias": None,
            f"{theirs}.crossattention.masked_bias": None,
            f"{prefix}h.{{i}}.attn.bias": _causal_mask if masks else None,
            f"{prefix}h.{{i}}.attn.masked_bias": None,
        },
        unused=("score.weight",),
        fresh=("head/kernel", "class_head/kernel"),
    )


LAYOUTS = {
    # What transformers writes today, without and with the second name of the embedding.
    "huggingface": _layout("transformer."),
    "huggingface_torch": _layout("transformer.", head="lm_head.weight"),
    # Its first years; the files of gpt2 to gpt2-xl on the hub have no prefix, DistilGPT2's has.
    "huggingface_v2": _layout("transformer.", masks=True),
    "hub": _layout("", masks=True),
    "trunk": _layout(""),
    # nanoGPT has transformers' names, but matrices as torch's Linear keeps them; its checkpoints of
    # compiled models begin with _orig_mod.
    "nanogpt": _layout("transformer.", head="lm_head.weight", maps=dense_rules),
    "nanogpt_compiled": _layout(
        "_orig_mod.transformer.", head="_orig_mod.lm_head.weight", maps=dense_rules
    ),
}

_COMMON = dict(
    module=GPT2,
    task="language_modelling",
    paper="Language Models are Unsupervised Multitask Learners, OpenAI 2019",
    code="github.com/openai/gpt-2",
    licence="modified MIT",
)
_PUBLISHED = _COMMON | dict(files=(File("model.safetensors"), File("pytorch_model.bin")))

VARIANTS: dict[str, Variant] = {
    "distilgpt2": Variant(
        fields=dict(depth=6), params=81_912_576,
        **_PUBLISHED | dict(licence="Apache-2.0", paper="DistilBERT, arXiv 1910.01108",
                            code="github.com/huggingface/transformers"),
    ),
    "gpt2": Variant(
        fields={}, params=124_439_808, metric="WikiText-103 perplexity 37.5, zero-shot",
        **_PUBLISHED,
    ),
    "gpt2_medium": Variant(
        fields=dict(embed_dim=1024, depth=24, num_heads=16), params=354_823_168,
        metric="WikiText-103 perplexity 26.4, zero-shot", **_PUBLISHED,
    ),
    "gpt2_large": Variant(
        fields=dict(embed_dim=1280, depth=36, num_heads=20), params=774_030_080,
        metric="WikiText-103 perplexity 22.1, zero-shot", **_PUBLISHED,
    ),
    "gpt2_xl": Variant(
        fields=dict(embed_dim=1600, depth=48, num_heads=25), params=1_557_611_200,
        metric="WikiText-103 perplexity 17.5, zero-shot", **_PUBLISHED,
    ),
    "gpt2_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, max_positions=64),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
