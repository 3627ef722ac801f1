"""PatchTST: a token is a patch of one series, and every series is read alone by the same weights.

Nie et al., "A Time Series is Worth 64 Words: Long-term Forecasting with Transformers", ICLR 2023,
arXiv 2211.14730. Code: github.com/thuml/Time-Series-Library (MIT), which has a head for each task
and which we follow; it publishes no weights. With x_v the L steps of variate v:

    x_v = (x_v - mean x_v) / sqrt(var x_v + 1e-5)          each series of each window by itself
    p   = patches of 16 steps, one every 8, of x_v with its last value repeated 8 times more
    h   = W_p p + positions                                P = (L - 16) / 8 + 2 tokens; sinusoids
    h   = LN(h + MHA(h));  h = LN(h + MLP(h))              over patches, `depth` times
    h   = BN(h)                                            each channel, over all patches
    y_v = (W_h flatten(h_v) + b) * sqrt(var x_v + 1e-5) + mean x_v

With `num_classes` it classifies: W flatten(h) over all variates. With `horizon` equal to the
context it reconstructs (anomaly detection), and if it is `masked`, too, it imputes: it takes the
mask of what was seen, and the mean and deviation are of that alone.

Paper and library differ, beside details: the authors' own code (github.com/yuqinie98/PatchTST)
learns its positions, has BatchNorm in place of every LayerNorm and adds the scores of one layer to
those of the next; `zoo.models.timeseries.patchtst_original` is that one. A series of which nothing
was seen is NaN in the library and zero here.

    features    patchtst_etth1_96_96
    embed       7  12  512
    layer0      7  12  512
    norm        7  12  512
    forecast    96  7
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules, linear
from zoo.layers.dense import Dense
from zoo.layers.mlp import gelu
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import (
    PostNormBlock,
    bias_init,
    check_mask,
    check_series,
    post_norm_rules,
    sinusoids,
    sinusoids_of,
    standardise,
)
from zoo.system import System, Variant


def patch_count(length: int, patch_length: int, stride: int) -> int:
    """How many patches a series is cut into, the repeated end included."""
    return (length - patch_length) // stride + 2


def patches(
    x: Float[Array, "batch variates time"], patch_length: int, stride: int
) -> Float[Array, "batch variates patches patch_length"]:
    """Windows of `patch_length` steps at every `stride`-th, the last value repeated for one more.

    Raises:
      ValueError: if the series is shorter than a patch.
    """
    if x.shape[2] < patch_length:
        raise ValueError(
            f"A series of {x.shape[2]} steps holds no patch of {patch_length}; choose a shorter "
            "patch_length or a longer context_length."
        )
    starts = stride * np.arange(patch_count(x.shape[2], patch_length, stride))
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, stride)), mode="edge")
    return padded[..., starts[:, None] + np.arange(patch_length)]


class PatchTST(Model):
    """PatchTST.

    Attributes:
      context_length: steps of the past that it sees, L.
      horizon: steps that it forecasts.
      variates: of `example_inputs`; a forecaster takes any number, a classifier this one.
      patch_length: steps of a patch.
      stride: steps from one patch to the next.
      embed_dim: width of a token.
      depth: layers.
      mlp_dim: width of the middle of an MLP.
      masked: it takes the `mask` of what was seen of the series (imputation).
      num_classes: logits of so many classes in place of a forecast; 0: a forecast.
    """

    context_length: int = 96
    horizon: int = 96
    variates: int = 7
    patch_length: int = 16
    stride: int = 8
    embed_dim: int = 512
    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    activation: Callable = gelu
    masked: bool = False
    num_classes: int = 0
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        types = {"series": jnp.float32} | ({"mask": jnp.bool_} if self.masked else {})
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}

    def __call__(
        self,
        series: Float[Array, "batch context variates"],
        mask: Bool[Array, "batch context variates"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch horizon variates"] | Float[Array, "batch classes"]:
        """The forecast, or logits."""
        return self.features(series, mask, train)["logits" if self.num_classes else "forecast"]

    @nn.compact
    def features(
        self,
        series: Float[Array, "batch context variates"],
        mask: Bool[Array, "batch context variates"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        variates = self.variates if self.num_classes else None
        check_series(self, series, self.context_length, variates)
        check_mask(self, mask, series.shape if self.masked else None)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=torch_default_init, **types)
        dropout = partial(nn.Dropout(self.dropout), deterministic=not train)
        x, mean, deviation = standardise(series, mask)
        x = patches(x.swapaxes(1, 2), self.patch_length, self.stride)
        x = dense(self.embed_dim, use_bias=False, name="embed")(x)
        x = dropout(x + sinusoids(x.shape[2], self.embed_dim).astype(self.dtype))
        shape = x.shape  # [batch, variates, patches, channels]
        out = {"embed": constrain(x, "batch", None, "length", "channels")}
        x = x.reshape(-1, *shape[2:])
        sizes = (self.num_heads, self.mlp_dim, self.activation, self.dropout)
        for i in range(self.depth):
            x = PostNormBlock(*sizes, name=f"layers_{i}", **types)(x, train)
            out[f"layer{i}"] = x.reshape(shape)
        norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name="norm", **types)
        x = out["norm"] = norm(x, use_running_average=not train).reshape(shape)
        x = x.swapaxes(2, 3)  # the library flattens channels first
        if self.num_classes:
            x = dropout(x).reshape(x.shape[0], -1)
            bias = bias_init(x.shape[-1])
            out["logits"] = dense(self.num_classes, bias_init=bias, name="head")(x)
            return out
        x = x.reshape(*shape[:2], -1)
        y = dense(self.horizon, bias_init=bias_init(x.shape[-1]), name="head")(x)
        y = dropout(y).swapaxes(1, 2).astype(jnp.float32) * deviation + mean
        out["forecast"] = y.astype(self.dtype)
        return out


# ---------------------------------------------------------------------------- checkpoints


def _naming(head: str) -> Rules:
    """Rules of the library's models with this name of the head."""
    return Rules(
        [
            Rule("patch_embedding.value_embedding.weight", "embed/kernel", linear),
            *post_norm_rules("encoder.attn_layers.{i}", "layers_{i}"),
            *batch_norm_rules("encoder.norm.1", "norm"),
            *dense_rules(head, "head"),
        ],
        derived={
            "patch_embedding.position_embedding.pe": sinusoids_of,
            "encoder.norm.1.num_batches_tracked": lambda model: np.zeros((), np.int64),
        },
        fresh=("head/kernel", "head/bias"),
    )


LAYOUTS = {"forecaster": _naming("head.linear"), "classifier": _naming("projection")}
"""Both are the library's; `zoo.export` of a classifier wants `layout="classifier"`."""

_COMMON = dict(
    module=PatchTST,
    paper="A Time Series is Worth 64 Words: Long-term Forecasting with Transformers, "
    "arXiv 2211.14730",
    code="github.com/thuml/Time-Series-Library",
    licence="MIT",
)

_HORIZONS = (96, 192, 336, 720)

# Table -> variates, and for each horizon depth and heads, in the order of `_HORIZONS`.
_SCRIPTS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "etth1": (7, (1, 1, 1, 1), (2, 8, 8, 16)),
    "etth2": (7, (3, 3, 3, 3), (4, 4, 4, 4)),
    "ettm1": (7, (1, 3, 1, 3), (2, 2, 4, 4)),
    "ettm2": (7, (3, 3, 1, 3), (16, 2, 4, 4)),
    "weather": (21, (2, 2, 2, 2), (4, 16, 4, 4)),
    "exchange": (8, (2, 2, 2, 2), (8, 8, 8, 8)),
    "ecl": (321, (2, 2, 2, 2), (8, 8, 8, 8)),
    "traffic": (862, (2, 2, 2, 2), (8, 8, 8, 8)),
}

# Horizon -> width and heads of ILI, at a context of 36 weeks.
_ILI = {24: (1024, 4), 36: (2048, 4), 48: (2048, 4), 60: (2048, 16)}

# Set of the UEA archive -> variates, steps of its longest series, classes.
_ARCHIVE: dict[str, tuple[int, int, int]] = {
    "ethanol_concentration": (3, 1751, 4),
    "face_detection": (144, 62, 2),
    "handwriting": (3, 152, 26),
    "heartbeat": (61, 405, 2),
    "japanese_vowels": (12, 29, 9),
    "pems_sf": (963, 144, 7),
    "self_regulation_scp1": (6, 896, 2),
    "self_regulation_scp2": (7, 1152, 2),
    "spoken_arabic_digits": (13, 93, 10),
    "uwave_gesture_library": (3, 315, 8),
}


def _forecaster(variates: int, horizon: int, **fields: int) -> Variant:
    """A variant with its number of parameters."""
    model = PatchTST(horizon=horizon, variates=variates, **fields)
    tokens = patch_count(model.context_length, model.patch_length, model.stride)
    params = _encoder(model) + (model.embed_dim * tokens + 1) * horizon
    fields = dict(horizon=horizon, variates=variates, **fields)
    return Variant(fields=fields, task="forecasting", params=params, **_COMMON)


def _classifier(variates: int, length: int, classes: int) -> Variant:
    """The same of a classifier."""
    fields = dict(context_length=length, variates=variates, num_classes=classes,
                  embed_dim=128, depth=3, mlp_dim=256)  # fmt: skip
    model = PatchTST(**fields)
    tokens = patch_count(length, model.patch_length, model.stride)
    params = _encoder(model) + (variates * model.embed_dim * tokens + 1) * classes
    return Variant(fields=fields, task="series_classification", params=params, **_COMMON)


def _encoder(model: PatchTST) -> int:
    """Parameters without the head."""
    width, middle = model.embed_dim, model.mlp_dim
    block = 4 * width * (width + 1) + 2 * width * middle + middle + 5 * width
    return model.patch_length * width + model.depth * block + 2 * width


VARIANTS: dict[str, Variant] = {
    f"patchtst_{table}_96_{horizon}": _forecaster(
        variates, horizon, depth=depth, num_heads=heads, mlp_dim=512 if table == "traffic" else 2048
    )
    for table, (variates, depths, all_heads) in _SCRIPTS.items()
    for horizon, depth, heads in zip(_HORIZONS, depths, all_heads, strict=True)
}
VARIANTS |= {
    f"patchtst_ili_36_{horizon}": _forecaster(
        7, horizon, context_length=36, embed_dim=width, depth=4, num_heads=heads
    )
    for horizon, (width, heads) in _ILI.items()
}
VARIANTS |= {f"patchtst_{name}": _classifier(*sizes) for name, sizes in _ARCHIVE.items()}
VARIANTS["patchtst_test"] = Variant(
    fields=dict(context_length=24, horizon=12, variates=3, patch_length=8, stride=4, embed_dim=32,
                mlp_dim=64, num_heads=4),
    task="forecasting",
    **_COMMON,
)  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
