"""iTransformer: a whole series is one token, and attention is between variates.

Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting", ICLR
2024, arXiv 2310.06625. Official code: github.com/thuml/iTransformer (MIT), which we follow; no
weights are published. Its tasks beside forecasting are those of Time-Series-Library (MIT).

    x_v    = (x_v - mean x_v) / sqrt(var x_v + 1e-5)         each series of each window by itself
    h_v    = W_e x_v + b                                     L steps -> one token; no positions
    h      = LN(h + MHA(h));   h = LN(h + MLP(h))            over tokens, `depth` times; then LN
    y_v    = (W_h h_v + b) * sqrt(var x_v + 1e-5) + mean x_v

Time features are tokens like variates, and are dropped before the forecast; the paper has none, the
code has them wherever a table has dates. Every weight is used on every token alike, so the number
of variates may differ between training and use.

The repository has the same model with the attention of other papers (`attention`): "flow" is
iFlowformer and "prob_sparse" iInformer, which always standardise. With sigmoid(q), sigmoid(k):

    I_i = q_i . sum_j k_j,   O_j = k_j . sum_i q_i           what flows in and out
    R_i = sigmoid(q_i . sum_j k_j / O_j)                     allocation
    C_j = n softmax_j(k_j . sum_i q_i / I_i)                 competition
    y_i = R_i / I_i * q_i sum_j k_j^T C_j v_j

iFlashformer is the softmax, computed in blocks. "hashed" is iReformer, whose tokens see those that
hash to the same buckets or next to them (`HashedAttention`).

With `num_classes` it classifies: no standardising, W flatten(GELU(h)). With `horizon` equal to the
context it reconstructs (imputation, anomaly detection).

    features    itransformer_etth2_96_96
    embed       11  128    7 variates and 4 time features
    layer0      11  128
    layer1      11  128
    norm        11  128
    forecast    96   7
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rules, dense_rules, norm_rules
from zoo.layers.dense import Dense
from zoo.layers.mlp import gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.series import (
    PostNormBlock,
    check_series,
    check_time_features,
    embed_series,
    example_series,
    post_norm_rules,
    read_classes,
    read_forecast,
    standardise,
)
from zoo.models.language.reformer import buckets_of, look_adjacent
from zoo.models.timeseries.informer import kept, prob_sparse_attention
from zoo.system import System, Variant


def flow_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
) -> Float[Array, "batch length heads head_dim"]:
    """Attention of linear cost that conserves what flows from values to queries (Flowformer)."""
    eps, out = 1e-6, value.dtype
    q, k, value = (x.astype(jnp.float32) for x in (query, key, value))
    q, k = nn.sigmoid(q), nn.sigmoid(k)

    def flow(x: Array, y: Array) -> Float[Array, "batch length heads"]:
        return jnp.einsum("blnd,bnd->bln", x + eps, y.sum(1) + eps)

    inward, outward = 1 / flow(q, k), 1 / flow(k, q)
    allocation = nn.sigmoid(flow(q, k * outward[..., None]))
    competition = nn.softmax(flow(k, q * inward[..., None]), axis=1) * k.shape[1]
    mixed = jnp.einsum("bknd,bkne->bnde", k, value * competition[..., None])
    y = jnp.einsum("bqnd,bnde->bqne", q, mixed)
    return (y * (inward * allocation)[..., None]).astype(out)


class HashedAttention(nn.Module):
    """Attention to tokens that are sorted next to one, by hashes of what is query and key at once.

    Numbers are those of github.com/lucidrains/reformer-pytorch (MIT), which the repository uses: in
    each round the bucket of a token is the nearest of random directions and their opposites, tokens
    are sorted by round and bucket, and see their own chunk and the one before it, in a ring. Keys
    have length 1. A token sees itself only where nothing else is near. Rounds are weighed by the
    sums of their exponentials. Zeros complete the tokens to whole pairs of chunks, and are seen.

    Attributes:
      num_heads: must divide the channels.
      chunk: tokens of a chunk, and of a bucket on average.
      rounds: of hashing.
    """

    num_heads: int
    chunk: int = 4
    rounds: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def rotation_shape(self, length: int, channels: int) -> tuple[int, int, int]:
        """Of the random directions for so many tokens: head width, rounds, half the buckets."""
        return channels // self.num_heads, self.rounds, -(-length // (2 * self.chunk))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        rotations: Float[Array, "head_dim rounds half"],
    ) -> Float[Array, "batch length channels"]:
        """The tokens after attention."""
        batch, length, channels = x.shape
        dense = partial(Dense, channels, dtype=self.dtype, param_dtype=self.param_dtype)
        x = jnp.pad(x, ((0, 0), (0, -length % (2 * self.chunk)), (0, 0)))
        total = x.shape[1]
        heads = (batch, total, self.num_heads, -1)
        query = dense(use_bias=False, name="query_key")(x).reshape(heads).swapaxes(1, 2)
        value = dense(use_bias=False, name="value")(x).reshape(heads).swapaxes(1, 2)
        query, value = query.astype(jnp.float32), value.astype(jnp.float32)
        bucket = buckets_of(
            jax.lax.stop_gradient(query),
            jnp.broadcast_to(rotations, (self.num_heads, *rotations.shape)),
            (2 * rotations.shape[-1],),
        )
        bucket = bucket + 2 * rotations.shape[-1] * jnp.arange(self.rounds)[:, None]
        order = jnp.argsort(bucket.reshape(*bucket.shape[:2], -1), axis=-1, stable=True)
        undo, at = jnp.argsort(order, axis=-1), order % total

        def chunked(x: Array) -> Array:
            x = jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 3)), 2)
            return x.reshape(*x.shape[:2], -1, self.chunk, *x.shape[3:])

        square = jnp.square(query).sum(-1, keepdims=True)
        key = query * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        key, value = (look_adjacent(chunked(t), 1, 0) for t in (key, value))
        place = at.reshape(*at.shape[:2], -1, self.chunk)
        itself = place[..., :, None] == look_adjacent(place, 1, 0)[..., None, :]
        scores = jnp.einsum("bncqd,bnckd->bncqk", chunked(query), key) * query.shape[-1] ** -0.5
        scores = jnp.where(itself, -5e4, scores)
        weight = jax.nn.logsumexp(scores, axis=-1)
        y = jnp.einsum("bncqk,bnckd->bncqd", jnp.exp(scores - weight[..., None]), value)
        y = y.reshape(*order.shape, y.shape[-1])
        y = jnp.take_along_axis(y, undo[..., None], 2)
        weight = jnp.take_along_axis(weight.reshape(order.shape), undo, 2)
        rounds = (*order.shape[:2], self.rounds, total)
        share = jax.nn.softmax(weight.reshape(rounds), axis=2)
        y = (y.reshape(*rounds, -1) * share[..., None]).sum(2).swapaxes(1, 2)[:, :length]
        return dense(name="out")(y.reshape(batch, length, channels).astype(self.dtype))


class ITransformer(Model):
    """iTransformer.

    Attributes:
      context_length: steps of the past that it sees, L.
      horizon: steps that it forecasts.
      variates: of `example_inputs`; a forecaster takes any number, a classifier this one.
      time_features: numbers of the date of a step, each of which becomes a token; 0: none.
      embed_dim: width of a token.
      depth: layers.
      mlp_dim: width of the middle of an MLP.
      attention: of the variants of the repository (see above).
      factor: of `prob_sparse`: so many times ceil(ln n) keys are sampled and queries kept.
      standardise: each series of a window by its own mean and deviation, and back.
      num_classes: logits of so many classes in place of a forecast; 0: a forecast.
    """

    context_length: int = 96
    horizon: int = 96
    variates: int = 7
    time_features: int = 4
    embed_dim: int = 512
    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 512
    activation: Callable = gelu
    attention: Literal["softmax", "flow", "prob_sparse", "hashed"] = "softmax"
    factor: int = 1
    standardise: bool = True
    num_classes: int = 0
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return example_series(self, batch_size)

    def __call__(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Float[Array, "batch context features"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch horizon variates"] | Float[Array, "batch classes"]:
        """The forecast, or logits."""
        out = self.features(series, time_features, train)
        return out["logits" if self.num_classes else "forecast"]

    @nn.compact
    def features(
        self,
        series: Float[Array, "batch context variates"],
        time_features: Float[Array, "batch context features"] | None = None,
        train: bool = False,
        samples: Sequence[Array] | None = None,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        `samples` are, of each layer, the sampled keys of `prob_sparse` `[queries, sampled]`, or the
        directions of `hashed` (`HashedAttention.rotation_shape`); without them they are drawn with
        the rng stream `sample`, and without one always the same.
        """
        variates = self.variates if self.num_classes else None
        check_series(self, series, self.context_length, variates)
        check_time_features(self, time_features, series.shape[0])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        scaled = self.standardise and not self.num_classes
        x, mean, deviation = standardise(series) if scaled else (series, 0.0, 1.0)
        if time_features is not None:
            x = jnp.concatenate([x, time_features.astype(x.dtype)], axis=-1)
        x = embed_series(self, x, train)
        out = {"embed": x}
        sizes = (self.num_heads, self.mlp_dim, self.activation, self.dropout)
        for i in range(self.depth):
            how = self._attend(samples, i)
            how = {"mixer": how} if self.attention == "hashed" else {"attend": how}
            block = PostNormBlock(*sizes, **how, name=f"layers_{i}", **types)
            x = out[f"layer{i}"] = block(x, train)
        x = out["norm"] = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        if self.num_classes:
            return out | {"logits": read_classes(self, x, None, train)}
        out["forecast"] = read_forecast(self, x[:, : series.shape[-1]], mean, deviation)
        return out

    def _attend(self, samples: Sequence[Array] | None, i: int) -> Callable | None:
        """The attention of layer `i`; None: softmax; of "hashed" its module, which draws."""
        if self.attention == "softmax":
            return None
        if self.attention == "flow":
            return flow_attention
        rng = self.make_rng("sample") if self.has_rng("sample") else jax.random.key(0)
        rng = jax.random.fold_in(rng, i)
        if self.attention == "hashed":

            def mixer(**types: Any) -> Callable[[Array], Array]:
                module = HashedAttention(self.num_heads, **types)

                def mix(x: Array) -> Array:
                    if samples is not None:
                        return module(x, samples[i])
                    return module(x, jax.random.normal(rng, module.rotation_shape(*x.shape[1:])))

                return mix

            return mixer

        def attend(query: Array, key: Array, value: Array) -> Array:
            count = kept(key.shape[1], self.factor)
            draw = partial(jax.random.randint, rng)
            shape, end = (query.shape[1], count), key.shape[1]
            chosen = draw(shape, 0, end) if samples is None else samples[i]
            # the code reads its output as if heads came before tokens, which mixes them
            return prob_sparse_attention(query, key, value, chosen, count).swapaxes(1, 2)

        return attend


# ---------------------------------------------------------------------------- checkpoints


def _naming(head: str, hashed: bool = False) -> Rules:
    """Rules of one published naming; `hashed`: of iReformer."""
    block, attention = "encoder.attn_layers.{i}", "layers_{i}/attention"
    rules = post_norm_rules(block, "layers_{i}")
    if hashed:
        rules = [rule for rule in rules if attention not in rule.targets[0].text]
        for theirs, ours in (("toqk", "query_key"), ("tov", "value"), ("to_out", "out")):
            rules += dense_rules(f"{block}.attention.attn.{theirs}", f"{attention}/{ours}")
    return Rules(
        [
            *dense_rules("enc_embedding.value_embedding", "embed"),
            *rules,
            *norm_rules("encoder.norm", "norm"),
            *dense_rules(head, "head"),
        ],
        fresh=("head/kernel", "head/bias"),
    )


LAYOUTS = {
    "official": _naming("projector"),
    "tslib": _naming("projection"),
    "official_hashed": _naming("projector", hashed=True),
}

_COMMON = dict(
    module=ITransformer,
    task="forecasting",
    paper="iTransformer: Inverted Transformers Are Effective for Time Series Forecasting, "
    "arXiv 2310.06625",
    code="github.com/thuml/iTransformer",
    licence="MIT",
)

# Table -> variates, depth, {horizon: width} and what else its official script sets.
_SCRIPTS: dict[str, tuple[int, int, dict[int, int], dict]] = {
    "etth1": (7, 2, {96: 256, 192: 256, 336: 512, 720: 512}, {}),
    "etth2": (7, 2, dict.fromkeys((96, 192, 336, 720), 128), {}),
    "ettm1": (7, 2, dict.fromkeys((96, 192, 336, 720), 128), {}),
    "ettm2": (7, 2, dict.fromkeys((96, 192, 336, 720), 128), {}),
    "exchange": (8, 2, dict.fromkeys((96, 192, 336, 720), 128), {}),
    "ecl": (321, 3, dict.fromkeys((96, 192, 336, 720), 512), {}),
    "pems03": (358, 4, dict.fromkeys((12, 24, 48, 96), 512), {"time_features": 0}),
    "pems04": (
        307,
        4,
        dict.fromkeys((12, 24, 48, 96), 1024),
        {"time_features": 0, "standardise": False},
    ),
}


def _params(length: int, horizon: int, width: int, depth: int) -> int:
    """Parameters of a model whose MLP is as wide as a token."""
    block = 4 * width * (width + 1) + 2 * width * (width + 1) + 4 * width
    return (length + 1) * width + depth * block + 2 * width + (width + 1) * horizon


VARIANTS: dict[str, Variant] = {
    f"itransformer_{table}_96_{horizon}": Variant(
        fields=dict(horizon=horizon, variates=variates, embed_dim=width, mlp_dim=width,
                    depth=depth, **more),
        params=_params(96, horizon, width, depth),
        **_COMMON,
    )
    for table, (variates, depth, widths, more) in _SCRIPTS.items()
    for horizon, width in widths.items()
} | {
    "itransformer_test": Variant(
        fields=dict(context_length=24, horizon=12, variates=5, embed_dim=32, mlp_dim=64,
                    num_heads=4),
        **_COMMON,
    )
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
