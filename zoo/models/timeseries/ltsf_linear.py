"""LTSF-Linear: one linear map from the past to the future, the same for every variate.

Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023, arXiv 2205.13504.
Official code: github.com/cure-lab/LTSF-Linear (Apache-2.0), which we follow; no weights are
published. With x_c the last L steps of variate c, and y_c its next H:

    Linear     y_c = W x_c + b
    NLinear    y_c = W (x_c - x_c[L]) + b + x_c[L]           the last value, subtracted and added
    DLinear    y_c = W_s season_c + b_s + W_t trend_c + b_t  trend: moving average over 25 steps,
                                                             its ends repeated; season: the rest

`individual` models have a W and b for every variate. Time-Series-Library's DLinear starts W at 1/L;
here, as in the official code, all start as PyTorch's Linear does. Its tasks are those of that
library (MIT), and here of all three: with `horizon` equal to the context they reconstruct
(imputation, anomaly detection); with `num_classes` H is L, and W flatten(y) + b are the logits.

    features    dlinear_336_96
    season      336  7     (DLinear only)
    trend       336  7     (DLinear only)
    forecast     96  7
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rules, dense_rules
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init, check_series, decompose, torch_linear
from zoo.system import System, Variant


class Weights(nn.Module):
    """The matrix and bias of one linear map over time; named as those of a Dense."""

    context_length: int
    horizon: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "context horizon"], Float[Array, "horizon"]]:
        """The two arrays."""
        shape, bias = (self.context_length, self.horizon), bias_init(self.context_length)
        kernel = self.param("kernel", torch_default_init, shape, self.param_dtype)
        return kernel, self.param("bias", bias, (self.horizon,), self.param_dtype)


class TimeLinear(nn.Module):
    """A linear map over time: one for all variates, or one each (`variate_0 ...`)."""

    context_length: int
    horizon: int
    variates: int
    individual: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch context variates"]
    ) -> Float[Array, "batch horizon variates"]:
        sizes = (self.context_length, self.horizon, self.param_dtype)
        x = x.astype(self.dtype)
        if self.individual:
            each = [Weights(*sizes, name=f"variate_{c}")() for c in range(self.variates)]
            kernel, bias = jax.tree.map(lambda *a: jnp.stack(a).astype(self.dtype), *each)
            y = jnp.einsum("blv,vlh->bhv", x, kernel) + bias.T
        else:
            kernel, bias = (array.astype(self.dtype) for array in Weights(*sizes, name="shared")())
            y = jnp.einsum("blv,lh->bhv", x, kernel) + bias[:, None]
        return constrain(y, "batch", "time", "variates")


class Linear(Model):
    """A linear map of the context.

    Attributes:
      context_length: steps of the past that it sees, L.
      horizon: steps that it forecasts, H.
      variates: how many series there are; only with `individual` do weights depend on it.
      individual: weights of its own for every variate.
      num_classes: logits of so many classes in place of a forecast; 0: a forecast.
    """

    context_length: int = 336
    horizon: int = 96
    variates: int = 7
    individual: bool = False
    num_classes: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def linear(self, name: str) -> TimeLinear:
        """A linear map over time called `name`."""
        horizon = self.context_length if self.num_classes else self.horizon
        sizes = (self.context_length, horizon, self.variates, self.individual)
        return TimeLinear(*sizes, self.dtype, self.param_dtype, name=name)

    def read(self, y: Float[Array, "batch horizon variates"]) -> dict[str, Array]:
        """The forecast, or logits of it."""
        if not self.num_classes:
            return {"forecast": y}
        y = y.reshape(y.shape[0], -1)
        return {"logits": torch_linear(self, self.num_classes, y.shape[-1], "head")(y)}

    def __call__(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> Float[Array, "batch horizon variates"] | Float[Array, "batch classes"]:
        """The forecast, or logits."""
        return self.features(series, train)["logits" if self.num_classes else "forecast"]

    @nn.compact
    def features(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> dict[str, Array]:
        """The forecast; nothing of it depends on `train`."""
        check_series(self, series, self.context_length, self.variates)
        return self.read(self.linear("linear")(series))


class NLinear(Linear):
    """A linear map of the context relative to its last value; fields as in `Linear`."""

    @nn.compact
    def features(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> dict[str, Array]:
        """The forecast."""
        check_series(self, series, self.context_length, self.variates)
        last = jax.lax.stop_gradient(series[:, -1:])
        return self.read(self.linear("linear")(series - last) + last.astype(self.dtype))


class DLinear(Linear):
    """The sum of a linear map of the season and one of the trend; fields as in `Linear`.

    Attributes:
      moving_average: steps of the average that is the trend; odd.
    """

    moving_average: int = 25

    @nn.compact
    def features(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> dict[str, Array]:
        """Both parts, and the forecast."""
        check_series(self, series, self.context_length, self.variates)
        season, trend = decompose(series, self.moving_average)
        y = self.linear("season")(season) + self.linear("trend")(trend)
        return {"season": season, "trend": trend} | self.read(y)


# ---------------------------------------------------------------------------- checkpoints

_PARTS = {"Linear": "linear", "Linear_Seasonal": "season", "Linear_Trend": "trend"}

LAYOUTS = {
    "official": Rules(
        [
            rule
            for theirs, ours in _PARTS.items()
            for place, name in ((theirs, "shared"), (f"{theirs}.{{c}}", "variate_{c}"))
            for rule in dense_rules(place, f"{ours}/{name}")
        ]
        + dense_rules("projection", "head"),
        fresh=("head/kernel", "head/bias"),
    )
}

_COMMON = dict(
    task="forecasting",
    paper="Are Transformers Effective for Time Series Forecasting?, arXiv 2205.13504",
    code="github.com/cure-lab/LTSF-Linear",
    licence="Apache-2.0",
)

# MSE/MAE of ETTh1 and of ETTm1 in LTSF-Benchmark.md, for horizons 96, 192, 336 and 720.
_PUBLISHED: dict[str, tuple[type[Linear], str, str]] = {
    "ltsf_linear": (
        Linear,
        "0.375/0.397 0.418/0.429 0.479/0.476 0.624/0.592",
        "0.308/0.352 0.340/0.369 0.376/0.393 0.440/0.435",
    ),
    "nlinear": (
        NLinear,
        "0.374/0.394 0.408/0.415 0.429/0.427 0.440/0.453",
        "0.306/0.348 0.349/0.375 0.375/0.388 0.433/0.422",
    ),
    "dlinear": (
        DLinear,
        "0.375/0.399 0.405/0.416 0.439/0.443 0.472/0.490",
        "0.299/0.343 0.335/0.365 0.369/0.386 0.425/0.421",
    ),
}

VARIANTS: dict[str, Variant] = {
    f"{name}_336_{horizon}": Variant(
        module=module,
        fields=dict(context_length=336, horizon=horizon),
        params=337 * horizon * (2 if module is DLinear else 1),
        metric=f"MSE/MAE: ETTh1 {hourly.split()[i]}, ETTm1 {minutes.split()[i]}",
        **_COMMON,
    )
    for name, (module, hourly, minutes) in _PUBLISHED.items()
    for i, horizon in enumerate((96, 192, 336, 720))
} | {
    "dlinear_test": Variant(
        module=DLinear, fields=dict(context_length=48, horizon=24, variates=3), **_COMMON
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
