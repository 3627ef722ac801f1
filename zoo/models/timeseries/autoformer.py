"""Autoformer: attention to a series shifted in time, between decompositions into season and trend.

Wu et al., "Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series
Forecasting", NeurIPS 2021, arXiv 2106.13008. Official code: github.com/thuml/Autoformer (MIT),
which we follow; no weights are published. Its heads beside the forecast are those of
Time-Series-Library (MIT). m is `moving_average`, c `factor`, all indices of time are modulo L.

    decompose   trend = mean over m steps, ends repeated;  season = x - trend
    correlate   R(tau) = sum_t q_t . k_(t - tau) = irfft(rfft q  conj rfft k), mean over heads and
                channels; k and v are cut, or continued with zeros, to the length of q
    aggregate   y_t = sum_i w_i v_(t + tau_i) over the floor(c ln L) delays of largest R, w their
                softmax; in training the delays are those of the batch's mean R
    encoder     x = season(x + correlate(x));  x = season(x + MLP(x)), `depth` times
    decoder     of the season of the last `label_length` steps and then zeros, with a memory; beside
                it runs the trend of those steps and then the mean of all: each layer decomposes
                three times and adds Conv_3 of its trends' sum
    forecast    W SN(x) + b + trend; SN is LayerNorm minus its mean over time

Where paper and code differ: one set of delays serves all heads and channels, and the decoder is not
causal (nothing reads the flag for it). SN takes its bias out again, so nothing depends on it.

Without `time_features` none are added. With `decoder_depth=0` every step of the encoder is read
out, which reconstructs (imputation, anomaly detection). With `num_classes` it classifies:
W flatten(GELU(x)), with zeros where the `mask`, if it takes one, has padding.

    features    autoformer_ettm1_96_96
    encoder     96  512
    season     144  7    48 known steps and the horizon
    trend      144  7
    forecast    96  7
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, conv, dense_rules, norm_rules
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain, on_each_device
from zoo.layers.patch import torch_default_init
from zoo.layers.series import (
    DatedEmbedding,
    ProjectedAttention,
    attention_rules,
    bias_init,
    check_both,
    decodes,
    decompose,
    embedding_rules,
    example_of_both,
    mlp_rules,
    read_classes,
    sinusoids_of,
)
from zoo.system import System, Variant


def kept(length: int, factor: int) -> int:
    """How many delays of so many are kept."""
    return min(int(factor * math.log(length)), length)


def circular_correlation(
    x: Float[Array, "batch time heads head_dim"],
    y: Float[Array, "batch time heads head_dim"],
    even: bool = False,
) -> Float[Array, "batch delays heads head_dim"]:
    """At each delay: the sum over t of x_t y_(t - delay), indices modulo the length.

    `even` takes the spectrum of an odd length for that of one less, and gives so many delays.
    """
    exact = jnp.promote_types(x.dtype, jnp.float32)  # there is no transform of half precision
    delays = x.shape[1] - (x.shape[1] % 2 if even else 0)

    def correlate(x: Array, y: Array) -> Array:
        spectrum = jnp.fft.rfft(x, axis=1) * jnp.fft.rfft(y, axis=1).conj()
        return jnp.fft.irfft(spectrum, n=delays, axis=1)

    run = on_each_device(correlate, "batch", None, "heads", "head_dim")
    return run(x.astype(exact), y.astype(exact))


def fit_length(
    x: Float[Array, "batch keys heads head_dim"], length: int
) -> Float[Array, "batch length heads head_dim"]:
    """The first `length` steps, or zeros behind all."""
    more = max(0, length - x.shape[1])
    return jnp.pad(x[:, :length], ((0, 0), (0, more), (0, 0), (0, 0)))


def choose_delays(
    correlation: Float[Array, "batch time"], count: int, together: bool
) -> tuple[Float[Array, "batch delays"], Int[Array, "batch delays"]]:
    """Weights and delays of each example; `together`: the batch has the delays of its mean."""
    if together:
        delays = jax.lax.top_k(correlation.mean(0), count)[1]
        delays = jnp.broadcast_to(delays, (correlation.shape[0], count))
        found = jnp.take_along_axis(correlation, delays, axis=1)
    else:
        found, delays = jax.lax.top_k(correlation, count)
    return jax.nn.softmax(found, axis=-1), delays


def auto_correlation(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    factor: int,
    together: bool,
    even: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """The values, shifted by the delays at which query and key are most alike."""
    length = query.shape[1]
    key, value = fit_length(key, length), fit_length(value, length)
    correlation = circular_correlation(query, key, even).mean((2, 3))
    count = min(kept(length, factor), correlation.shape[1])
    weights, delays = choose_delays(correlation, count, together)
    # sum_i w_i v_(t + tau_i): again a correlation, with a series that has w_i at tau_i
    rows = jnp.arange(weights.shape[0])[:, None]
    spikes = jnp.zeros((weights.shape[0], length), weights.dtype).at[rows, delays].set(weights)
    return circular_correlation(value, spikes[..., None, None]).astype(value.dtype)


class Block(nn.Module):
    """Auto-correlation with itself, with a memory where there is one, and MLP; seasons go on.

    Attributes:
      variates: of the trend that a block with a memory gives beside its output.
    """

    num_heads: int
    mlp_dim: int
    factor: int
    even: bool
    moving_average: int
    activation: Callable
    dropout: float
    variates: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        train: bool,
        memory: Float[Array, "batch keys channels"] | None = None,
    ) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch length variates"] | None]:
        """Season, and with a memory the trend."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = partial(ProjectedAttention, self.num_heads, **types)
        attend = partial(auto_correlation, factor=self.factor, together=train, even=self.even)
        dropout = partial(nn.Dropout(self.dropout), deterministic=not train)
        y = attention(name="attention")(x, x, attend)
        x, trend = decompose(x + dropout(y), self.moving_average)
        trends = [trend]
        if memory is not None:
            y = attention(name="cross_attention")(x, memory, attend)
            x, trend = decompose(x + dropout(y), self.moving_average)
            trends.append(trend)
        start = {"kernel_init": torch_default_init, "use_bias": False}
        sizes = (self.mlp_dim, self.activation, self.dropout)
        y = Mlp(*sizes, name="mlp", **start, **types)(x, train)
        x, trend = decompose(x + y, self.moving_average)
        x = constrain(x, "batch", "length", "channels")
        if memory is None:
            return x, None
        read = nn.Conv(self.variates, (3,), padding="CIRCULAR", name="trend", **start, **types)
        return x, read(sum(trends) + trend)


class Autoformer(Model):
    """Autoformer.

    Attributes:
      context_length: steps of the past that the encoder sees.
      label_length: how many of them the decoder sees too.
      horizon: steps that it forecasts; without a decoder those of the context.
      time_features: numbers of the date of a step; 0: none.
      outputs: variates of each layer's season and trend; None: those that it sees, of which this
        can only be 1 or all.
      decoder_depth: layers of the decoder; 0: the encoder reconstructs the context.
      time_embedding: `features`: a linear map of the time features; `fixed`, `learned`: tables
        indexed by parts of the calendar, as in Informer.
      factor: c, of which the number of delays follows.
      even_delays: as Time-Series-Library, which takes the spectrum of an odd length for that of
        one less; of an even length it is the same.
      moving_average: steps of the average that is the trend; odd.
      num_classes: logits of so many classes in place of a forecast, from the encoder; 0: none.
      masked: a classifier that takes the `mask` of steps that are not padding.
    """

    context_length: int = 96
    label_length: int = 48
    horizon: int = 96
    variates: int = 7
    time_features: int = 4
    outputs: int | None = None
    embed_dim: int = 512
    depth: int = 2
    decoder_depth: int = 1
    num_heads: int = 8
    mlp_dim: int = 2048
    time_embedding: Literal["features", "fixed", "learned"] = "features"
    factor: int = 3
    even_delays: bool = False
    moving_average: int = 25
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
        time_features: Float[Array, "batch context features"] | None = None,
        future_time_features: Float[Array, "batch horizon features"] | None = None,
        mask: Bool[Array, "batch context"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch horizon variates"] | Float[Array, "batch classes"]:
        """The forecast, or logits."""
        features = self.features(series, time_features, future_time_features, mask, train)
        return features["logits" if self.num_classes else "forecast"]

    def features(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Float[Array, "batch context features"] | None = None,
        future_time_features: Float[Array, "batch horizon features"] | None = None,
        mask: Bool[Array, "batch context"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        check_both(self, series, time_features, future_time_features, mask)
        start_time_features = None
        if future_time_features is not None:
            known = time_features[:, self.context_length - self.label_length :]
            start_time_features = jnp.concatenate([known, future_time_features], axis=1)
        return self.transform(series, time_features, start_time_features, mask, train)

    @nn.compact
    def transform(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Float[Array, "batch context features"] | None,
        start_time_features: Float[Array, "batch decoded features"] | None,
        mask: Bool[Array, "batch context"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """The same with the time features of all steps of the decoder given."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embedding = partial(
            DatedEmbedding, self.embed_dim, self.time_embedding, self.time_features, **types
        )
        embedding = partial(embedding, positions=False, use_bias=False, dropout=self.dropout)
        sizes = (self.num_heads, self.mlp_dim, self.factor, self.even_delays, self.moving_average)
        outputs = self.outputs or self.variates
        block = partial(Block, *sizes, self.activation, self.dropout, outputs, **types)

        def season_norm(name: str, x: Array) -> Array:
            x = LayerNorm(epsilon=1e-5, name=name, **types)(x)
            return x - x.mean(1, keepdims=True)

        def head(x: Array) -> Array:
            start = {"kernel_init": torch_default_init, "bias_init": bias_init(x.shape[-1])}
            return Dense(outputs, name="head", **start, **types)(x)

        x = embedding(name="embed")(series, time_features, train)
        for i in range(self.depth):
            x, _ = block(name=f"layers_{i}")(x, train)
        x = season_norm("norm", x)
        out = {"encoder": x}
        if self.num_classes:
            return out | {"logits": read_classes(self, x, mask, train)}
        if not decodes(self):
            return out | {"forecast": head(x)}
        season, trend = self._decoder_inputs(series)
        y = embedding(name="decoder_embed")(season, start_time_features, train)
        for i in range(self.decoder_depth):
            y, more = block(name=f"decoder_{i}")(y, train, x)
            trend = trend + more
        out |= {"season": head(season_norm("decoder_norm", y)), "trend": trend}
        forecast = (out["season"] + trend)[:, self.label_length :].astype(self.dtype)
        return out | {"forecast": forecast}

    def _decoder_inputs(
        self, series: Float[Array, "batch context variates"]
    ) -> tuple[Float[Array, "batch decoded variates"], Float[Array, "batch decoded variates"]]:
        """Season, then zeros; trend, then the mean of the whole context."""
        season, trend = (
            part[:, self.context_length - self.label_length :]
            for part in decompose(series, self.moving_average)
        )
        ahead = (series.shape[0], self.horizon, series.shape[2])
        mean = jnp.broadcast_to(series.mean(1, keepdims=True), ahead)
        season = jnp.concatenate([season, jnp.zeros(ahead, season.dtype)], axis=1)
        return season, jnp.concatenate([trend, mean], axis=1)


# ---------------------------------------------------------------------------- checkpoints


def _decoder_positions(model: Autoformer) -> np.ndarray | None:
    """A table that the code holds and never reads."""
    return sinusoids_of(model) if decodes(model) else None


def _naming(head: str, unused: tuple[str, ...] = ()) -> Rules:
    """Rules of the official models with this name of the head."""
    return Rules(
        [
            *embedding_rules("enc_embedding", "embed"),
            *embedding_rules("dec_embedding", "decoder_embed"),
            *attention_rules("encoder.attn_layers.{i}.attention", "layers_{i}/attention"),
            *mlp_rules("encoder.attn_layers.{i}", "layers_{i}"),
            *norm_rules("encoder.norm.layernorm", "norm"),
            *attention_rules("decoder.layers.{i}.self_attention", "decoder_{i}/attention"),
            *attention_rules("decoder.layers.{i}.cross_attention", "decoder_{i}/cross_attention"),
            *mlp_rules("decoder.layers.{i}", "decoder_{i}"),
            Rule("decoder.layers.{i}.projection.weight", "decoder_{i}/trend/kernel", conv),
            *norm_rules("decoder.norm.layernorm", "decoder_norm"),
            *dense_rules(head, "head"),
        ],
        derived={
            "enc_embedding.position_embedding.pe": sinusoids_of,
            "dec_embedding.position_embedding.pe": _decoder_positions,
        },
        unused=unused,
        fresh=("head/kernel", "head/bias"),
    )


LAYOUTS = {
    "official": _naming("decoder.projection"),
    # Time-Series-Library's, of models without a decoder; without time features, too,
    # they hold a map of them.
    "encoder": _naming("projection", ("enc_embedding.temporal_embedding.embed.weight",)),
}
"""`zoo.export` of a model without a decoder wants `layout="encoder"`."""

_COMMON = dict(
    module=Autoformer,
    task="forecasting",
    paper="Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series "
    "Forecasting, arXiv 2106.13008",
    code="github.com/thuml/Autoformer",
    licence="MIT",
)

_LONG, _HOURS, _QUARTERS = (96, 192, 336, 720), (24, 48, 168, 336, 720), (24, 48, 96, 288, 672)

# Table -> context, variates, horizons, and what else its official script sets.
_SCRIPTS: dict[str, tuple[int, int, tuple[int, ...], dict]] = {
    "etth1": (96, 7, _HOURS, {}),
    "etth2": (96, 7, _HOURS, {}),
    "ettm1": (96, 7, _QUARTERS, {"time_features": 5}),
    "ettm2": (96, 7, _QUARTERS, {"time_features": 5, "factor": 1}),
    "exchange": (96, 8, _LONG, {}),
    "weather": (96, 21, _LONG, {}),
    "ecl": (96, 321, _LONG, {}),
    "traffic": (96, 862, _LONG, {}),
    "ili": (36, 7, (24, 36, 48, 60), {"label_length": 18}),
}

# MSE/MAE at a context of 96, as LTSF-Benchmark.md of cure-lab/LTSF-Linear has them.
_PUBLISHED = {
    "etth1": {336: "0.521/0.496", 720: "0.514/0.512"},
    "ettm1": {96: "0.505/0.475"},
    "ettm2": {96: "0.255/0.339"},
    "ecl": {96: "0.201/0.317", 192: "0.222/0.334", 336: "0.231/0.338", 720: "0.254/0.361"},
    "weather": {96: "0.266/0.336", 192: "0.307/0.367", 336: "0.359/0.395", 720: "0.419/0.428"},
}


def _params(variates: int, time_features: int = 4, width: int = 512, middle: int = 2048) -> int:
    """Parameters of two layers of the encoder and one of the decoder."""
    embeddings = 2 * (3 * variates + time_features) * width
    attentions, mlps = 4 * 4 * width * (width + 1), 3 * 2 * width * middle
    norms, heads = 4 * width, 3 * width * variates + (width + 1) * variates
    return embeddings + attentions + mlps + norms + heads


VARIANTS: dict[str, Variant] = {
    f"autoformer_{table}_{context}_{horizon}": Variant(
        fields=dict(context_length=context, horizon=horizon, variates=variates, **more),
        params=_params(variates, more.get("time_features", 4)),
        metric=f"MSE/MAE: {found}" if (found := _PUBLISHED.get(table, {}).get(horizon)) else "",
        **_COMMON,
    )
    for table, (context, variates, horizons, more) in _SCRIPTS.items()
    for horizon in horizons
} | {
    "autoformer_test": Variant(
        # A factor that keeps every delay: rounding to bfloat16 may not choose others.
        fields=dict(context_length=20, label_length=10, horizon=10, variates=3, embed_dim=32,
                    num_heads=4, mlp_dim=64, moving_average=5, factor=7),
        **_COMMON,
    )
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, frozen=(r".*_table",))
