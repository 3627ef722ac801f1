"""What models of time series share. Series are `batch time variates`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.checkpoints.rules import Rule, chain, conv, dense_rules, linear, norm_rules, squeeze
from zoo.layers import position
from zoo.layers.attention import Attention
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init

pointwise = chain(squeeze(-1), linear)
"""`[out, in, 1]` of torch's Conv1d of width 1 <-> `[in, out]` of Flax's Dense kernel."""


TABLES = (("month", 13), ("day", 32), ("weekday", 7), ("hour", 24), ("minute", 4))
"""Parts of the calendar, in the order of their numbers, and how many values each has."""

kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""How Informer and its descendants start the convolution of their embedding."""


def bias_init(fan_in: int) -> Callable[..., Array]:
    """Initialiser of a bias as PyTorch draws it: uniform within `1 / sqrt(fan_in)`."""
    bound = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def sinusoids(length: int, channels: int) -> Float[Array, "length channels"]:
    """Fixed positions as Informer's code and its descendants make them, their angles in float32."""
    return jnp.asarray(position.sinusoids(length, channels, np.float32))


def sinusoids_of(model: nn.Module) -> np.ndarray:
    """The table of 5,000 positions that official checkpoints hold."""
    return np.asarray(sinusoids(5000, model.embed_dim))[None]


def moving_average(
    x: Float[Array, "batch time variates"], width: int
) -> Float[Array, "batch time variates"]:
    """The mean over `width` steps around each step; both ends are repeated outwards.

    Raises:
      ValueError: if `width` is even, so that no step is its middle.
    """
    if width % 2 == 0:
        raise ValueError(f"A moving average of width {width} has no middle; choose an odd width.")
    half = width // 2
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (half, half), (0, 0)), mode="edge")
    total = jax.lax.reduce_window(padded, 0.0, jax.lax.add, (1, width, 1), (1, 1, 1), "valid")
    return (total / width).astype(x.dtype)


def decompose(
    x: Float[Array, "batch time variates"], width: int
) -> tuple[Float[Array, "batch time variates"], Float[Array, "batch time variates"]]:
    """Season and trend: the trend is the moving average, the season what is left."""
    trend = moving_average(x, width)
    return x - trend, trend


def standardise(
    x: Float[Array, "batch time variates"], mask: Bool[Array, "batch time variates"] | None = None
) -> tuple[Float[Array, "batch time variates"], Array, Array]:
    """Each series by its own mean and deviation; gives the series, the means, the deviations.

    With a mask only what it is True for counts, and the rest becomes zero, as
    Time-Series-Library's PatchTST does for imputation.
    """
    x = x.astype(jnp.float32)
    if mask is None:
        mean = jax.lax.stop_gradient(x.mean(1, keepdims=True))
        x = x - mean
        deviation = jnp.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    else:
        seen = jnp.maximum(mask.sum(1, keepdims=True), 1)
        mean = jax.lax.stop_gradient(jnp.where(mask, x, 0).sum(1, keepdims=True) / seen)
        x = jnp.where(mask, x - mean, 0)
        deviation = jnp.sqrt((x**2).sum(1, keepdims=True) / seen + 1e-5)
    return x / deviation, mean, deviation


def embed_series(
    model: nn.Module, x: Float[Array, "batch time variates"], train: bool
) -> Float[Array, "batch variates channels"]:
    """One token a series: a linear map of all its steps, and dropout.

    Called in the compact method of `model`, which gets `embed`.
    """
    x = x.swapaxes(1, 2)
    x = torch_linear(model, model.embed_dim, x.shape[-1], "embed")(x)
    x = nn.Dropout(model.dropout)(x, deterministic=not train)
    return constrain(x, "batch", "length", "channels")


def read_forecast(
    model: nn.Module,
    x: Float[Array, "batch variates channels"],
    mean: Array | float,
    deviation: Array | float,
) -> Float[Array, "batch horizon variates"]:
    """The forecast of one token a series: a linear map, and back to the scale of the series.

    Called in the compact method of `model`, which gets `head`.
    """
    y = torch_linear(model, model.horizon, x.shape[-1], "head")(x).swapaxes(1, 2)
    return (y.astype(jnp.float32) * deviation + mean).astype(model.dtype)


def read_classes(
    model: nn.Module,
    x: Float[Array, "batch length channels"],
    mask: Bool[Array, "batch length"] | None,
    train: bool,
) -> Float[Array, "batch classes"]:
    """Logits `W flatten(GELU(x))`, with zeros where the mask, if there is one, has padding.

    Called in the compact method of `model`, which gets `head`.
    """
    x = nn.Dropout(model.dropout)(gelu(x), deterministic=not train)
    x = x if mask is None else jnp.where(mask[..., None], x, 0)
    x = x.reshape(x.shape[0], -1)
    return torch_linear(model, model.num_classes, x.shape[-1], "head")(x)


def torch_linear(model: nn.Module, width: int, fan_in: int, name: str) -> nn.Module:
    """A dense layer of the model's types that starts as PyTorch's Linear does."""
    start = {"kernel_init": torch_default_init, "bias_init": bias_init(fan_in)}
    return Dense(width, name=name, dtype=model.dtype, param_dtype=model.param_dtype, **start)


class DatedEmbedding(nn.Module):
    """The sum of a convolution over three steps (the ends meet), positions and time.

    Attributes:
      channels: of a step.
      time_embedding: of the date of a step: `features`: a linear map of numbers; `fixed`,
        `learned`: tables indexed by parts of the calendar.
      time_features: how many numbers, or parts.
      positions: whether fixed positions are added.
      use_bias: of the convolution and of the map.
    """

    channels: int
    time_embedding: str
    time_features: int
    positions: bool = True
    use_bias: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        series: Float[Array, "batch time variates"],
        time_features: Array | None,
        train: bool,
    ) -> Float[Array, "batch time channels"]:
        settings = dict(padding="CIRCULAR", kernel_init=kaiming, **self._settings)
        bias = bias_init(3 * series.shape[-1])
        x = nn.Conv(self.channels, (3,), name="conv", bias_init=bias, **settings)(series)
        if self.positions:
            x = x + sinusoids(series.shape[1], self.channels).astype(self.dtype)
        if time_features is not None:
            x = x + self._time(time_features)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return constrain(x, "batch", "length", "channels")

    @property
    def _settings(self) -> dict[str, Any]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return {"use_bias": self.use_bias, **types}

    def _time(self, time_features: Array) -> Float[Array, "batch time channels"]:
        if self.time_embedding == "features":
            start = dict(kernel_init=torch_default_init, bias_init=bias_init(self.time_features))
            return Dense(self.channels, name="time", **start, **self._settings)(time_features)
        tables = enumerate(TABLES[: self.time_features])
        parts = (self._table(*table)[time_features[..., i]] for i, table in tables)
        return sum(part.astype(self.dtype) for part in parts)

    def _table(self, name: str, size: int) -> Float[Array, "size channels"]:
        shape = (size, self.channels)
        if self.time_embedding == "learned":
            return self.param(name, nn.initializers.normal(1.0), shape, self.param_dtype)
        fixed = lambda key, shape, dtype: sinusoids(*shape).astype(dtype)  # noqa: E731
        return jax.lax.stop_gradient(self.param(f"{name}_table", fixed, shape, self.param_dtype))


class PostNormBlock(nn.Module):
    """Self-attention and MLP, each followed by the residual connection and then LayerNorm.

    The encoder layer of Informer and of the models that grew out of its code; `mlp` is a pair of
    convolutions of width 1 there.

    Attributes:
      attend: another attention than softmax, `(query, key, value) -> output`; None: softmax.
      mixer: a module in place of attention and its projections, `mixer(name)(x)`.
    """

    num_heads: int
    mlp_dim: int
    activation: Callable = gelu
    dropout: float = 0.0
    attend: Callable[[Array, Array, Array], Array] | None = None
    mixer: Callable[..., nn.Module] | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool = False
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.mixer is not None:
            y = self.mixer(name="attention", **types)(x)
            y = nn.Dropout(self.dropout)(y, deterministic=not train)
        elif self.attend is None:
            y = Attention(
                self.num_heads,
                fused=False,
                attention_dropout=self.dropout,
                dropout=self.dropout,
                kernel_init=torch_default_init,
                name="attention",
                **types,
            )(x, train=train)
        else:
            y = ProjectedAttention(self.num_heads, name="attention", **types)(x, x, self.attend)
            y = nn.Dropout(self.dropout)(y, deterministic=not train)
        x = LayerNorm(epsilon=1e-5, name="norm1", **types)(x + y)
        y = Mlp(
            self.mlp_dim,
            self.activation,
            self.dropout,
            kernel_init=torch_default_init,
            name="mlp",
            **types,
        )(x, train)
        x = LayerNorm(epsilon=1e-5, name="norm2", **types)(x + y)
        return constrain(x, "batch", "length", "channels")


class ProjectedAttention(nn.Module):
    """The projections around an attention that the caller gives: `(query, key, value) -> output`.

    Attributes:
      num_heads: of the attention.
      mix: read the output out as if its heads came before its steps (Informer's decoder).
    """

    num_heads: int
    mix: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        memory: Float[Array, "batch keys channels"],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "batch length channels"]:
        channels = x.shape[-1]

        def dense(name: str, x: Array) -> Array:
            start = {"kernel_init": torch_default_init, "bias_init": bias_init(channels)}
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return nn.Dense(channels, name=name, **start, **types)(x)

        def heads(x: Array) -> Array:
            x = x.reshape(*x.shape[:2], self.num_heads, -1)
            return constrain(x, "batch", "length", "heads", "head_dim")

        query, key, value = dense("query", x), dense("key", memory), dense("value", memory)
        y = attend(heads(query), heads(key), heads(value))
        y = y.swapaxes(1, 2) if self.mix else y
        return dense("out", y.reshape(x.shape))


def embedding_rules(theirs: str, ours: str) -> list[Rule]:
    """Checkpoint rules of a `DatedEmbedding`; fixed and learned tables have names of their own."""
    table = f"{theirs}.temporal_embedding.{{}}_embed.emb.weight"
    return [
        Rule(f"{theirs}.value_embedding.tokenConv.weight", f"{ours}/conv/kernel", conv),
        Rule(f"{theirs}.value_embedding.tokenConv.bias", f"{ours}/conv/bias"),
        *dense_rules(f"{theirs}.temporal_embedding.embed", f"{ours}/time"),
        *(Rule(table.format(name), f"{ours}/{name}_table") for name, _ in TABLES),
        *(Rule(table.format(name).replace(".emb.", "."), f"{ours}/{name}") for name, _ in TABLES),
    ]


def post_norm_rules(theirs: str, ours: str) -> list[Rule]:
    """Checkpoint rules of a `PostNormBlock`, as Informer and its descendants name it."""
    rules = [*norm_rules(f"{theirs}.norm1", f"{ours}/norm1")]
    rules += norm_rules(f"{theirs}.norm2", f"{ours}/norm2")
    rules += attention_rules(f"{theirs}.attention", f"{ours}/attention")
    return rules + mlp_rules(theirs, ours)


def attention_rules(theirs: str, ours: str) -> list[Rule]:
    """Those of its four projections."""
    return [
        rule
        for name in ("query", "key", "value", "out")
        for rule in dense_rules(f"{theirs}.{name}_projection", f"{ours}/{name}")
    ]


def mlp_rules(theirs: str, ours: str) -> list[Rule]:
    """Those of its MLP: two convolutions of width 1, with biases or without."""
    return [
        rule
        for name, place in (("conv1", "up"), ("conv2", "down"))
        for rule in (
            Rule(f"{theirs}.{name}.weight", f"{ours}/mlp/{place}/kernel", pointwise),
            Rule(f"{theirs}.{name}.bias", f"{ours}/mlp/{place}/bias"),
        )
    ]


def example_series(model: nn.Module, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the series that a model takes, and of its time features where it has some."""
    sizes = {"series": model.variates}
    sizes |= {"time_features": model.time_features} if model.time_features else {}
    shape = (batch_size, model.context_length)
    return {name: jax.ShapeDtypeStruct((*shape, n), jnp.float32) for name, n in sizes.items()}


def decodes(model: nn.Module) -> bool:
    """Whether a model with an encoder has a decoder, too: not without layers, nor to classify."""
    return model.decoder_depth > 0 and not model.num_classes


def example_of_both(
    model: nn.Module, batch_size: int, time_features: jnp.dtype = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what an encoder takes, and a decoder where the model has one."""
    shapes = {"series": (model.context_length, model.variates)}
    if model.time_features:
        shapes["time_features"] = (model.context_length, model.time_features)
    if model.time_features and decodes(model):
        shapes["future_time_features"] = (model.horizon, model.time_features)
    if model.masked:
        shapes["mask"] = (model.context_length,)
    types = {
        "time_features": time_features,
        "future_time_features": time_features,
        "mask": jnp.bool_,
    }
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), types.get(name, jnp.float32))
        for name, shape in shapes.items()
    }


def check_both(
    model: nn.Module,
    series: Float[Array, "batch time variates"],
    time_features: Array | None,
    future_time_features: Array | None,
    mask: Bool[Array, "batch time"] | None,
) -> None:
    """Refuse what such a model does not take, and an encoder alone that is to forecast.

    Raises:
      ValueError: naming it and what to change.
    """
    check_series(model, series, model.context_length, model.variates)
    check_time_features(model, time_features, series.shape[0])
    count = model.time_features if decodes(model) else 0
    if count or future_time_features is not None:
        wanted = (series.shape[0], model.horizon, count)
        _check_features(model, "future_time_features", future_time_features, wanted)
    check_mask(model, mask, series.shape[:2] if model.masked else None)
    encodes = not decodes(model) and not model.num_classes
    if encodes and model.horizon != model.context_length:
        raise ValueError(
            f"decoder_depth=0 reconstructs the context of {model.context_length} steps, and "
            f"horizon={model.horizon}; create it with horizon={model.context_length}."
        )


def check_series(
    model: object,
    series: Float[Array, "batch time variates"],
    context_length: int,
    variates: int | None = None,
) -> None:
    """Refuse a series of another shape than the model takes; None: any number of variates.

    Raises:
      ValueError: naming the shape and what to change.
    """
    wanted = (context_length, series.shape[-1] if variates is None else variates)
    if series.ndim != 3 or series.shape[1:] != wanted:
        raise ValueError(
            f"This {type(model).__name__} takes series of shape (batch, {context_length}, "
            f"{variates or 'variates'}), not {series.shape}; cut other windows, or create the "
            "model with another context_length or variates."
        )


def check_time_features(model: object, features: Array | None, batch: int) -> None:
    """Refuse time features of another shape than the model takes; without any, None is right.

    Raises:
      ValueError: naming the shape and what to change.
    """
    wanted = (batch, model.context_length, model.time_features)
    _check_features(model, "time_features", features, wanted)


def _check_features(
    model: object, name: str, features: Array | None, wanted: tuple[int, int, int]
) -> None:
    shape, (batch, length, count) = None if features is None else features.shape, wanted
    if shape != ((batch, length, count) if count else None):
        kind = type(model).__name__
        raise ValueError(
            f"This {kind} takes {name} of shape (batch, {length}, {count}), not {shape}; give "
            "windows that have them, or create the model with another time_features."
            if count
            else f"This {kind} takes no {name}; create it with time_features={shape[-1]}."
        )


def check_mask(model: object, mask: Array | None, wanted: tuple[int, ...] | None) -> None:
    """Refuse a mask of another shape than the model takes; `wanted` None: it takes none.

    Raises:
      ValueError: naming the shape and what to change.
    """
    shape = None if mask is None else mask.shape
    if shape != wanted:
        raise ValueError(
            f"This {type(model).__name__} takes no mask; create it with masked=True."
            if wanted is None
            else f"This {type(model).__name__} takes a mask of shape {wanted}, not {shape}; give "
            "data that has one, or create the model with masked=False."
        )
