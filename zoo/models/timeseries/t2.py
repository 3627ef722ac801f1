"""t2: a time-series transformer that classifies astronomical transients from their light curves.

Allam and McEwen, "Paying Attention to Astronomical Transients: Introducing the Time-series
Transformer for Photometric Classification", RASTI 2024, arXiv 2105.06178. Official code and trained
weights: github.com/tallamjr/astronet (Apache-2.0), which we follow.

    x   fluxes at 100 times in each band, from a Gaussian process (`zoo.data.light_curves`)
    z   two numbers for the whole curve: redshift of the host galaxy, and its error
    h = relu(W x + b) + positions          sine and cosine, not scaled
    h = LN(h + attention(h)); h = LN(h + mlp(h))
    logits = V mean_t(h) + c

`add_aux_to` says where z goes: "steps" appends it as further times, each the pair over and over
(the official "L"); "channels" as further bands at every time ("M"). The mean over time of the
class-activation map, plus the bias, is the logit: what decided, and how much of it was z.

The published files hold probabilities behind the softmax; we return logits, as other classifiers.

    features    t2_plasticc_wz
    embed       102  32
    block1      102  32
    activation  102  14    class-activation map: V h
    logits      14
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, squeeze
from zoo.layers.attention import Attention
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.position import sinusoids
from zoo.layers.series import check_series
from zoo.system import File, System, Variant

init = nn.initializers.glorot_uniform()


def append_steps(
    series: Float[Array, "batch time variates"], aux: Float[Array, "batch features"]
) -> Float[Array, "batch time+features variates"]:
    """`aux` over and over, cut into as many further times as it has numbers."""
    steps = jnp.tile(aux, (1, series.shape[2])).reshape(aux.shape[0], -1, series.shape[2])
    return jnp.concatenate([series, steps], 1)


def append_channels(
    series: Float[Array, "batch time variates"], aux: Float[Array, "batch features"]
) -> Float[Array, "batch time variates+features"]:
    """`aux` as further variates, the same at all times."""
    repeated = jnp.broadcast_to(aux[:, None], (*series.shape[:2], aux.shape[1]))
    return jnp.concatenate([series, repeated], 2)


APPEND = {"steps": append_steps, "channels": append_channels}


class Block(nn.Module):
    """Self-attention and MLP, each followed by the residual connection and then LayerNorm."""

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool = False
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = partial(nn.Dropout(self.dropout), deterministic=not train)
        attention = Attention(
            self.num_heads, fused=False, kernel_init=init, name="attention", **types
        )
        x = LayerNorm(name="norm1", **types)(x + drop(attention(x, train=train)))
        mlp = Mlp(self.mlp_dim, nn.relu, kernel_init=init, name="mlp", **types)
        x = LayerNorm(name="norm2", **types)(x + drop(mlp(x, train)))
        return constrain(x, "batch", "length", "channels")


class T2(Model):
    """t2 classifier.

    Attributes:
      context_length: times of a light curve.
      variates: bands.
      aux_features: numbers for the whole curve; 0: none.
      add_aux_to: "steps" or "channels".
      dropout: rate in the blocks and before the head.
    """

    context_length: int = 100
    variates: int = 6
    num_classes: int = 14
    embed_dim: int = 32
    depth: int = 1
    num_heads: int = 16
    mlp_dim: int = 128
    aux_features: int = 0
    add_aux_to: str = "steps"
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shapes = {"series": (batch_size, self.context_length, self.variates)}
        if self.aux_features:
            shapes["aux"] = (batch_size, self.aux_features)
        return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def __call__(
        self,
        series: Float[Array, "batch time variates"],
        aux: Float[Array, "batch features"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.features(series, aux, train)["logits"]

    @nn.compact
    def features(
        self,
        series: Float[Array, "batch time variates"],
        aux: Float[Array, "batch features"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named map (see the table above)."""
        check_series(self, series, self.context_length, self.variates)
        self._check_aux(aux, series.shape[0])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = series if aux is None else APPEND[self.add_aux_to](series, aux)
        dense = partial(nn.Dense, kernel_init=init, **types)
        x = nn.relu(dense(self.embed_dim, name="embed")(x))
        even = self.embed_dim + self.embed_dim % 2  # of an odd width, the code cuts a wider table
        x = x + sinusoids(x.shape[1], even)[:, : self.embed_dim].astype(self.dtype)
        out = {"embed": constrain(x, "batch", "length", "channels")}
        for i in range(self.depth):
            sizes = (self.num_heads, self.mlp_dim, self.dropout)
            x = out[f"block{i + 1}"] = Block(*sizes, name=f"layers_{i}", **types)(x, train)
        head = nn.Dense(self.num_classes, kernel_init=init, name="head", **types)
        pooled = x.mean(1)
        out["logits"] = head(nn.Dropout(self.dropout)(pooled, deterministic=not train))
        bias = head(jnp.zeros_like(pooled[:1]))
        out["activation"] = head(x) - bias
        return out

    def _check_aux(self, aux: Array | None, batch: int) -> None:
        if self.add_aux_to not in APPEND:
            raise ValueError(f"add_aux_to={self.add_aux_to!r}; choose steps or channels.")
        shape = None if aux is None else aux.shape
        wanted = (batch, self.aux_features) if self.aux_features else None
        if shape != wanted:
            raise ValueError(
                f"This T2 takes aux of shape {wanted}, not {shape}; create it with "
                f"aux_features={shape[-1] if shape else 0}, or give what it takes."
            )


# ---------------------------------------------------------------------------- checkpoints

# The order of Keras: `trainable_variables/<number>` in files of TensorFlow.
_BLOCK = (
    ("att.query_dense.kernel", "attention/query/kernel"),
    ("att.query_dense.bias", "attention/query/bias"),
    ("att.key_dense.kernel", "attention/key/kernel"),
    ("att.key_dense.bias", "attention/key/bias"),
    ("att.value_dense.kernel", "attention/value/kernel"),
    ("att.value_dense.bias", "attention/value/bias"),
    ("att.combine_heads.kernel", "attention/out/kernel"),
    ("att.combine_heads.bias", "attention/out/bias"),
    ("ffn.0.kernel", "mlp/up/kernel"),
    ("ffn.0.bias", "mlp/up/bias"),
    ("ffn.1.kernel", "mlp/down/kernel"),
    ("ffn.1.bias", "mlp/down/bias"),
    ("layernorm1.gamma", "norm1/scale"),
    ("layernorm1.beta", "norm1/bias"),
    ("layernorm2.gamma", "norm2/scale"),
    ("layernorm2.beta", "norm2/bias"),
)
_DEPTH = 8  # layers that the numbered names are written out for
_VALUE = ".ATTRIBUTES/VARIABLE_VALUE"

LAYOUTS = {
    "keras": Rules(
        [
            Rule("embedding.conv1d.kernel", "embed/kernel", squeeze(0)),
            Rule("embedding.conv1d.bias", "embed/bias"),
            *(Rule(f"encoder.{{i}}.{theirs}", f"layers_{{i}}/{ours}") for theirs, ours in _BLOCK),
            Rule("classifier.kernel", "head/kernel"),
            Rule("classifier.bias", "head/bias"),
        ],
        fresh=("head/kernel", "head/bias"),
    ),
    "tensorflow": Rules(
        [
            Rule(f"trainable_variables/0/{_VALUE}", "embed/kernel", squeeze(0)),
            Rule(f"trainable_variables/1/{_VALUE}", "embed/bias"),
            *(
                Rule(
                    f"trainable_variables/{2 + len(_BLOCK) * i + j}/{_VALUE}", f"layers_{i}/{ours}"
                )
                for i in range(_DEPTH)
                for j, (_, ours) in enumerate(_BLOCK)
            ),
            Rule(f"classifier/kernel/{_VALUE}", "head/kernel"),
            Rule(f"classifier/bias/{_VALUE}", "head/bias"),
        ],
        fresh=("head/kernel", "head/bias"),
    ),
}

# ------------------------------------------------------------------------------- variants


def _variant(params: int | None, metric: str, file: str, **fields: int) -> Variant:
    return Variant(
        module=T2,
        fields=fields,
        task="series_classification",
        params=params,
        metric=metric,
        paper="Paying Attention to Astronomical Transients, arXiv 2105.06178",
        code="github.com/tallamjr/astronet",
        licence="Apache-2.0",
        files=(File(file),) if file else (),
    )


_FOLDER = "astronet/t2/models/plasticc"
VARIANTS = {
    "t2_plasticc_wz": _variant(
        13_390,
        "PLAsTiCC log-loss 0.507, accuracy 78.0 %",
        f"{_FOLDER}/model-UGRIZY-wZ-1619624444-0.1.dev765+g7c90cbb.d20210428-LL0.507",
        aux_features=2,
    ),
    "t2_plasticc": _variant(
        13_390,
        "PLAsTiCC log-loss 0.873",
        f"{_FOLDER}/model-UGRIZY-noZ-1619802068-0.1.dev779+ga930d1d-LL0.873",
    ),
    "t2_plasticc_gr": _variant(13_262, "PLAsTiCC log-loss 0.968", "", variates=2),
    "t2_test": _variant(
        None, "", "", context_length=12, variates=3, num_classes=5, embed_dim=32, num_heads=4,
        mlp_dim=64, depth=2, aux_features=2, dropout=0.0,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
