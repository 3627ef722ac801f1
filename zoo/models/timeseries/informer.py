"""Informer: attention for the few queries that need it, and a forecast in one shot.

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
AAAI 2021, arXiv 2012.07436. Official code: github.com/zhouhaoyi/Informer2020 (Apache-2.0), which we
follow; no weights are published. c is `factor`, L_q and L_k the numbers of queries and keys.

    ProbSparse   M_i = max_j q_i.k_j - sum_j q_i.k_j / L_k    over c ceil(ln L_k) keys, drawn with
                                                              replacement, the same for all heads
                 the c ceil(ln L_q) queries of the largest M attend to all keys; the others get the
                 mean of all values (encoder), or the sum of those up to them (decoder, causal)
    encoder      blocks of attention and MLP, LN after each; between blocks, distilling:
                 MaxPool_3/2(ELU(BN(Conv_3 x))), which halves the length
    decoder      of the last `label_length` steps and zeros for the horizon, all at once

Where paper and code differ: the sum of M is over the sampled keys but divided by L_k; the decoder
reads its self-attention's heads out in another order than it wrote them (`mix`), so that steps and
heads mix. The measure of a causal query sees keys after it. Keys are drawn in evaluation too: with
the rng stream `sample`, and without one always the same. `stacks` makes it InformerStack.

Heads beside the forecast are those of Time-Series-Library (MIT), of an encoder that does not
distil. With `decoder_depth=0` every step of it is read out, which reconstructs (imputation, anomaly
detection). With `num_classes` it classifies: W flatten(GELU(x)), with zeros where the `mask`, if it
takes one, has padding. Without `time_features` none are added. The library's own Informer is
another: its encoder mixes heads and steps, too, and its embedding has no biases.

    features      informer_etth1_96_24
    encoder       48  512    after distilling
    decoder       72  512    48 known steps and the horizon
    forecast      24   7
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, conv, dense_rules, norm_rules
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import (
    DatedEmbedding,
    ProjectedAttention,
    attention_rules,
    bias_init,
    check_both,
    decodes,
    embedding_rules,
    example_of_both,
    mlp_rules,
    read_classes,
    sinusoids_of,
)
from zoo.system import System, Variant


def kept(length: int, factor: int) -> int:
    """How many of so many keys are sampled, or queries kept."""
    return min(factor * math.ceil(math.log(length)), length)


def sparsity(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    samples: Int[Array, "queries sampled"],
) -> Float[Array, "batch heads queries"]:
    """M: how far the attention of each query is from an even one, estimated from sampled keys."""
    scores = jnp.einsum(
        "bqnd,bqsnd->bnqs", query, key[:, samples], preferred_element_type=jnp.float32
    )
    return scores.max(-1) - scores.sum(-1) / key.shape[1]


def prob_sparse_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    samples: Int[Array, "queries sampled"],
    count: int,
    causal: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention of the `count` queries of the largest `sparsity`; averages elsewhere."""
    top = jax.lax.top_k(sparsity(query, key, samples), count)[1].swapaxes(1, 2)
    chosen = jnp.take_along_axis(query, top[..., None], axis=1)
    later = jnp.arange(key.shape[1]) > top.swapaxes(1, 2)[..., None]
    bias = jnp.where(later, -1e30, 0.0) if causal else None
    rows = kernels_pallas.attention(chosen, key, value, bias=bias)
    base = value.cumsum(1) if causal else jnp.broadcast_to(value.mean(1)[:, None], query.shape)
    batch, heads = (jnp.arange(query.shape[i]) for i in (0, 2))
    place = batch[:, None, None], top, heads
    return base.at[place].set(rows.astype(base.dtype))


class Block(nn.Module):
    """Self-attention, attention to a memory where there is one, and MLP; LayerNorm after each."""

    num_heads: int
    mlp_dim: int
    activation: Callable
    dropout: float
    mix: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        attend: Callable,
        train: bool,
        memory: Float[Array, "batch keys channels"] | None = None,
        attend_memory: Callable | None = None,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        attention = partial(ProjectedAttention, self.num_heads, **types)
        dropout = partial(nn.Dropout(self.dropout), deterministic=not train)
        y = attention(mix=self.mix, name="attention")(x, x, attend)
        x = norm(name="norm1")(x + dropout(y))
        if memory is not None:
            y = attention(name="cross_attention")(x, memory, attend_memory)
            x = norm(name="norm2")(x + dropout(y))
        sizes = (self.mlp_dim, self.activation, self.dropout)
        y = Mlp(*sizes, kernel_init=torch_default_init, name="mlp", **types)(x, train)
        x = norm(name="norm2" if memory is None else "norm3")(x + y)
        return constrain(x, "batch", "length", "channels")


class Distil(nn.Module):
    """A convolution over three steps, BatchNorm, ELU, and the largest of three at every other."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool
    ) -> Float[Array, "batch half channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        start = dict(kernel_init=torch_default_init, bias_init=bias_init(3 * channels))
        x = nn.Conv(channels, (3,), padding="CIRCULAR", name="conv", **start, **types)(x)
        norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name="norm", **types)
        x = jax.nn.elu(norm(x, use_running_average=not train))
        return nn.max_pool(x, (3,), (2,), ((1, 1),))


class Informer(Model):
    """Informer.

    Attributes:
      context_length: steps of the past that the encoder sees.
      label_length: how many of them the decoder sees too.
      horizon: steps that it forecasts; without a decoder those of the context.
      time_features: numbers of the date, or parts of the calendar, of a step; 0: none.
      decoder_depth: layers of the decoder; 0: the encoder reconstructs the context.
      outputs: variates that it forecasts; None: as many as it sees.
      stacks: layers of each encoder of a stack, in place of `depth`.
      time_embedding: `features`: a linear map of them; `fixed`, `learned`: tables indexed by month,
        day, weekday, hour and quarter of an hour (`Windows(time_features="calendar")`).
      sparse: ProbSparse self-attention; else softmax.
      factor: c of ProbSparse.
      distil: halve the length between the layers of an encoder that has a decoder.
      mix: the decoder's self-attention mixes heads and steps.
      num_classes: logits of so many classes in place of a forecast, from the encoder; 0: none.
      masked: a classifier that takes the `mask` of steps that are not padding.
    """

    context_length: int = 96
    label_length: int = 48
    horizon: int = 24
    variates: int = 7
    time_features: int = 4
    outputs: int | None = None
    embed_dim: int = 512
    depth: int = 2
    stacks: tuple[int, ...] = ()
    decoder_depth: int = 1
    num_heads: int = 8
    mlp_dim: int = 2048
    time_embedding: Literal["features", "fixed", "learned"] = "features"
    sparse: bool = True
    factor: int = 5
    distil: bool = True
    mix: bool = True
    activation: Callable = gelu
    num_classes: int = 0
    masked: bool = False
    dropout: float = 0.05
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        features = self.time_embedding == "features"
        return example_of_both(self, batch_size, jnp.float32 if features else jnp.int32)

    def __call__(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Array | None = None,
        future_time_features: Array | None = None,
        mask: Bool[Array, "batch context"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch horizon variates"] | Float[Array, "batch classes"]:
        """The forecast, or logits."""
        features = self.features(series, time_features, future_time_features, mask, train)
        return features["logits" if self.num_classes else "forecast"]

    def features(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Array | None = None,
        future_time_features: Array | None = None,
        mask: Bool[Array, "batch context"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        check_both(self, series, time_features, future_time_features, mask)
        label = self.context_length - self.label_length
        start = jnp.pad(series[:, label:], ((0, 0), (0, self.horizon), (0, 0)))
        start_time_features = None
        if future_time_features is not None:
            start_time_features = jnp.concatenate(
                [time_features[:, label:], future_time_features], axis=1
            )
        return self.transform(series, time_features, start, start_time_features, mask, train)

    @nn.compact
    def transform(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Array | None,
        start: Float[Array, "batch decoded variates"],
        start_time_features: Array | None,
        mask: Bool[Array, "batch context"] | None = None,
        train: bool = False,
        samples: Sequence[Int[Array, "queries sampled"]] | None = None,
    ) -> dict[str, Array]:
        """The same with the decoder's input given, and perhaps each layer's sampled keys."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embedding = partial(
            DatedEmbedding, self.embed_dim, self.time_embedding, self.time_features, **types
        )
        embedding = partial(embedding, dropout=self.dropout)
        block = partial(Block, self.num_heads, self.mlp_dim, self.activation, self.dropout, **types)
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        attend = partial(self._attend, samples, train)
        embedded, found, before = embedding(name="embed")(series, time_features, train), [], 0
        for j, depth in enumerate(self.depths):
            prefix = f"stack_{j}_" if self.stacks else ""
            x = embedded[:, -(embedded.shape[1] // 2**j) :]
            for i in range(depth):
                layer = block(mix=False, name=f"{prefix}layers_{i}")
                x = layer(x, attend(before + i, False), train)
                if self.distils and i < depth - 1:
                    x = Distil(name=f"{prefix}distil_{i}", **types)(x, train)
            found.append(norm(name=f"{prefix}norm")(x))
            before += depth
        x = jnp.concatenate(found, axis=1)
        out = {"encoder": x}
        if self.num_classes:
            return out | {"logits": read_classes(self, x, mask, train)}
        if decodes(self):
            memory, softmax = x, self._softmax(False, train)
            x = embedding(name="decoder_embed")(start, start_time_features, train)
            for i in range(self.decoder_depth):
                layer = block(mix=self.mix, name=f"decoder_{i}")
                x = layer(x, attend(before + i, True), train, memory, softmax)
            x = out["decoder"] = norm(name="decoder_norm")(x)
        head = dict(kernel_init=torch_default_init, bias_init=bias_init(self.embed_dim))
        y = nn.Dense(self.outputs or self.variates, name="head", **head, **types)(x)
        return out | {"forecast": y[:, -self.horizon :]}

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each encoder."""
        return self.stacks or (self.depth,)

    @property
    def distils(self) -> bool:
        """Whether the length is halved."""
        return self.distil and decodes(self)

    def _softmax(self, causal: bool, train: bool) -> Callable:
        """Attention with dropout."""
        dropping = train and self.dropout > 0
        rng = self.make_rng("dropout") if dropping else None
        rate = self.dropout if dropping else 0.0
        mask = kernels_pallas.Causal() if causal else None
        return partial(kernels_pallas.attention, mask=mask, dropout=rate, rng=rng)

    def _attend(
        self, samples: Sequence[Array] | None, train: bool, index: int, causal: bool
    ) -> Callable:
        """The self-attention of layer `index`."""
        if not self.sparse:
            return self._softmax(causal, train)
        sampling = self.make_rng("sample") if self.has_rng("sample") else jax.random.key(0)

        def attend(query: Array, key: Array, value: Array) -> Array:
            queries, keys = query.shape[1], key.shape[1]
            if samples is None:
                shape = (queries, kept(keys, self.factor))
                chosen = jax.random.randint(jax.random.fold_in(sampling, index), shape, 0, keys)
            else:
                chosen = samples[index]
            count = kept(queries, self.factor)
            return prob_sparse_attention(query, key, value, chosen, count, causal)

        return attend


# ---------------------------------------------------------------------------- checkpoints


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    norms = [r for i in (1, 2, 3) for r in norm_rules(f"{theirs}.norm{i}", f"{ours}/norm{i}")]
    return norms + mlp_rules(theirs, ours)


def _encoder_rules(theirs: str, prefix: str) -> list[Rule]:
    layer, distil = f"{theirs}.attn_layers.{{i}}", f"{theirs}.conv_layers.{{i}}"
    return [
        *_block_rules(layer, f"{prefix}layers_{{i}}"),
        *attention_rules(f"{layer}.attention", f"{prefix}layers_{{i}}/attention"),
        Rule(f"{distil}.downConv.weight", f"{prefix}distil_{{i}}/conv/kernel", conv),
        Rule(f"{distil}.downConv.bias", f"{prefix}distil_{{i}}/conv/bias"),
        *batch_norm_rules(f"{distil}.norm", f"{prefix}distil_{{i}}/norm"),
        *norm_rules(f"{theirs}.norm", f"{prefix}norm"),
    ]


def _counter(model: Informer, i: int, j: int | None = None) -> np.ndarray | None:
    """BatchNorm's counter, which nothing uses."""
    if bool(model.stacks) != (j is not None) or not model.distils:
        return None
    depth = model.depth if j is None else (*model.stacks, 0)[min(j, len(model.stacks))]
    return np.zeros((), np.int64) if i < depth - 1 else None


def _decoder_positions(model: Informer) -> np.ndarray | None:
    return sinusoids_of(model) if decodes(model) else None


def _naming(head: str) -> Rules:
    """Rules of the published models with this name of the head."""
    return Rules(
        [
            *embedding_rules("enc_embedding", "embed"),
            *embedding_rules("dec_embedding", "decoder_embed"),
            *_encoder_rules("encoder", ""),
            *_encoder_rules("encoder.encoders.{j}", "stack_{j}_"),
            *_block_rules("decoder.layers.{i}", "decoder_{i}"),
            *attention_rules("decoder.layers.{i}.self_attention", "decoder_{i}/attention"),
            *attention_rules("decoder.layers.{i}.cross_attention", "decoder_{i}/cross_attention"),
            *norm_rules("decoder.norm", "decoder_norm"),
            *dense_rules(head, "head"),
        ],
        derived={
            "enc_embedding.position_embedding.pe": sinusoids_of,
            "dec_embedding.position_embedding.pe": _decoder_positions,
            "encoder.conv_layers.{i}.norm.num_batches_tracked": _counter,
            "encoder.encoders.{j}.conv_layers.{i}.norm.num_batches_tracked": _counter,
        },
        fresh=("head/kernel", "head/bias"),
    )


LAYOUTS = {
    "official": _naming("projection"),
    "library": _naming("decoder.projection"),  # Time-Series-Library's of forecasters
}

_COMMON = dict(
    module=Informer,
    task="forecasting",
    paper="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting, "
    "arXiv 2012.07436",
    code="github.com/zhouhaoyi/Informer2020",
    licence="Apache-2.0",
)

# MSE/MAE of ETTh1 at a context of 96, as LTSF-Benchmark.md of cure-lab/LTSF-Linear has them.
_PUBLISHED = {96: "0.865/0.713", 192: "1.008/0.792", 336: "1.107/0.809", 720: "1.181/0.865"}

VARIANTS: dict[str, Variant] = {
    f"informer_etth1_96_{horizon}": Variant(
        fields=dict(horizon=horizon),
        params=11_330_055,
        metric=f"MSE/MAE: {_PUBLISHED[horizon]}" if horizon in _PUBLISHED else "",
        **_COMMON,
    )
    for horizon in (24, *_PUBLISHED)
} | {
    "informer_test": Variant(
        # A factor that keeps every query: rounding to bfloat16 may not choose others.
        fields=dict(context_length=24, label_length=8, horizon=8, variates=3, embed_dim=32,
                    num_heads=4, mlp_dim=64, factor=8),
        **_COMMON,
    )
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, frozen=(r".*_table",))
