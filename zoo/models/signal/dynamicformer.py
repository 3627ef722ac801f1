"""DynamicFormer: logarithms of intersection numbers from their exponents and an Airy structure.

Hashemi, Corominas and Giacchetto, "Can Transformers Do Enumerative Geometry?", ICLR 2025, arXiv
2408.14915. Official code: github.com/Baran-phys/DynamicFormer (MIT), which we follow; no weights
are published. For <tau_d1 ... tau_dn>_g, see `zoo.data.intersection`:

    dra(x)  = x + a/b sin^2(a x) + c cos(b x) + d tanh(b x)     activation; a, b, c, d are learnt
    z       = mlp(g, n)                                         BatchNorm in its middle
    p_i     = dra(mlp(embedding(d_i), z))                       a token for each marked point
    r_i     = dra(mlp((k, a, b, log(1 + 100 B_kab)), z))        a token for each entry of B
    p, r    = p + encoder(p), r + encoder(r)                    r alone knows distances of its rows
    pool(x) = (sum, max, mean, deviation) x (1, s, 1/s)         s = log(rows + 1) / log(typical + 1)
    log <>  = mlp(BatchNorm([dra(pool(r) + pool(p)), z]))

An encoder is one pre-norm block and a memory token before the rows. Its attention normalises groups
of eight channels of a query and a key to length 1 and multiplies scores by 10. `alignment`, a part
of the loss, pulls the correlation of both memory tokens over a batch towards the identity.

Where sources differ: the paper's dra has a sin^2(x / b), the package torch-dra has b/a sin^2(a x)
and cos(a x) (`package_dra`); we follow the code that trained. The code pools over padding, too, and
leaves a whole sublayer out of a batch at random (`dropout`). It runs on a fork of x-transformers
that is not public: encoders are those of x-transformers 2.31.10 (MIT) with dra in its MLP. Its b
starts anywhere; ours starts at least 0.1 from 0, where dra has no value. C is read and not used.

    features    dynamicformer_psi
    sizes       64         z
    points      52   64    p, behind its encoder
    rows        1500 64    r, the same
    pooled      768
    alignment   1
    logits      1          log <tau_d1 ... tau_dn>_g
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules
from zoo.checkpoints.rules import linear as transposed
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.models.signal.dynamic_mlp import (
    DynamicMlp,
    DynamicRange,
    activation_rules,
    batch_norm,
    dra,
    linear,
    mlp_rules,
)
from zoo.system import System, Variant

# -------------------------------------------------------------------------------- encoder


def unit_groups(x: Float[Array, "*rest head_dim"], groups: int) -> Float[Array, "*rest head_dim"]:
    """Each of `groups` runs of channels divided by its length."""
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    y = y * jax.lax.rsqrt(jnp.maximum((y**2).sum(-1, keepdims=True), 1e-24))
    return y.reshape(x.shape).astype(x.dtype)


class OffsetNorm(nn.Module):
    """RMSNorm whose gains are 1 + scale."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rest channels"]) -> Float[Array, "*rest channels"]:
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return unit_groups(x, 1) * (x.shape[-1] ** 0.5 * (1 + scale.astype(self.dtype)))


class DistanceBias(nn.Module):
    """What attention adds to the score of a query and a key: an MLP of their signed distance."""

    hidden: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "1 heads length length"]:
        dense = partial(linear, True, dtype=self.dtype, param_dtype=self.param_dtype)
        x = jnp.arange(1.0 - length, length)[:, None]
        for i in range(2):
            x = nn.silu(dense(self.hidden, f"hidden{i}", x))
        table = dense(self.num_heads, "head", x)
        distance = np.subtract.outer(np.arange(length), np.arange(length))
        return jnp.moveaxis(table[distance + length - 1], -1, 0)[None]


class Encoder(nn.Module):
    """A block of attention and MLP over a memory token and the rows: new rows, and the token.

    Attributes:
      groups: of channels of a head, each normalised in queries and keys.
      distances: whether scores know how far apart rows are.
    """

    embed_dim: int
    num_heads: int
    groups: int
    distances: bool
    activation: Callable
    dropout: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch rows channels"],
        visible: Bool[Array, "batch rows"],
        train: bool,
    ) -> tuple[Float[Array, "batch rows channels"], Float[Array, "batch embed_dim"]]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, _, channels = x.shape
        norm = partial(OffsetNorm, **types)
        memory = self.param("memory", nn.initializers.normal(1.0), (1, self.embed_dim),
                            self.param_dtype).astype(self.dtype)  # fmt: skip
        y = linear(False, self.embed_dim, "embed", x, **types)
        y = jnp.concatenate([jnp.broadcast_to(memory, (batch, *memory.shape)), y], 1)
        visible = jnp.pad(visible, ((0, 0), (1, 0)), constant_values=True)
        y = constrain(y, "batch", "length", "channels")
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = y + self._sometimes(train, self._attend(norm(name="norm1")(y), visible, train))
        sizes = (4 * self.embed_dim, self.embed_dim, self.activation)
        mlp = DynamicMlp(*sizes, use_bias=False, dropout=self.dropout, name="mlp", **types)
        y = y + self._sometimes(train, mlp(norm(name="norm2")(y), train=train))
        y = norm(name="norm")(constrain(y, "batch", "length", "channels"))
        return linear(False, channels, "project", y[:, 1:], **types), y[:, 0]

    def _attend(self, x: Array, visible: Array, train: bool) -> Array:
        """Padding is not seen, and gets zeros."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query, key, value = (
            constrain(y.reshape(*x.shape[:2], self.num_heads, -1), "batch", "length", "heads", None)
            for y in (
                linear(False, self.embed_dim, n, x, **types) for n in ("query", "key", "value")
            )
        )
        bias = None
        if self.distances:
            sizes = (self.embed_dim // 4, self.num_heads)
            bias = DistanceBias(*sizes, name="distance", **types)(x.shape[1])
        dropping = train and self.dropout > 0
        x = kernels_pallas.attention(
            unit_groups(query, self.groups),
            unit_groups(key, self.groups),
            value,
            bias=bias,
            scale=10.0,
            query_segments=jnp.ones_like(visible, jnp.int32),
            key_segments=visible.astype(jnp.int32),
            dropout=self.dropout if dropping else 0.0,
            rng=self.make_rng("dropout") if dropping else None,
        )
        out = linear(False, self.embed_dim, "out", x.reshape(*x.shape[:2], -1), **types)
        return jnp.where(visible[..., None], out, 0)

    def _sometimes(self, train: bool, x: Array) -> Array:
        """In training, zeros for the whole batch at the rate of dropout."""
        if not train or not self.dropout:
            return x
        return jnp.where(jax.random.bernoulli(self.make_rng("dropout"), self.dropout), 0, x)


# ---------------------------------------------------------------------------------- model


def pool(
    x: Float[Array, "batch rows channels"], typical: Float[Array, "1"]
) -> Float[Array, "batch 12*channels"]:
    """LePNA: four summaries of a set times three scales, the scales fastest and channels slowest.

    Summaries are sum, maximum, mean and deviation (n - 1); scales 1, s and 1 / s, where s is the
    logarithm of rows + 1 over that of a learnt typical number of them.
    """
    x = x.astype(jnp.float32)
    s = jnp.log(x.shape[1] + 1.0) / jnp.log(typical[0] + 1.0)
    scaled = x[..., None] * jnp.stack([jnp.ones(()), s, 1 / s])
    variance = scaled.var(1, ddof=1)
    varies = variance > 0  # the root of 0 has no gradient
    deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)
    summaries = [scaled.sum(1), scaled.max(1), scaled.mean(1), deviation]
    return jnp.stack(summaries, 2).reshape(x.shape[0], -1)


class Pool(nn.Module):
    """`pool` with its learnt number."""

    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch rows channels"]) -> Float[Array, "batch 12*channels"]:
        typical = self.param("typical", nn.initializers.constant(9.0), (1,), self.param_dtype)
        return pool(x, typical.astype(jnp.float32))


def alignment(
    x: Float[Array, "batch channels"], y: Float[Array, "batch channels"]
) -> Float[Array, "1 1"]:
    """How far the correlation of two standardised sets of features is from the identity.

    Squared differences on the diagonal, and half the squares beside it (Barlow twins).
    """
    correlation = jnp.einsum("bi,bj->ij", x, y, precision="highest") / x.shape[0]
    on = jnp.diagonal(correlation)
    beside = jnp.square(correlation).sum() - jnp.square(on).sum()
    return (jnp.square(on - 1).sum() + 0.5 * beside).reshape(1, 1)


class DynamicFormer(Model):
    """DynamicFormer.

    Attributes:
      points: most marked points; exponents behind the n-th are padding.
      rows: most entries of B; those with a value of 0 are padding.
      vocab_size: exponents are below it.
      channels: width of a token.
      embed_dim: width of the encoders.
      hidden: middle of the MLPs beside those.
      groups: of channels of a head, each normalised in queries and keys.
      activation: `dra`, or `package_dra`.
      dropout: of embeddings, attention, MLPs and whole sublayers of the encoders.
    """

    points: int = 52
    rows: int = 1500
    vocab_size: int = 55
    channels: int = 64
    embed_dim: int = 256
    num_heads: int = 4
    groups: int = 8
    hidden: int = 128
    activation: Callable = dra
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return {
            "exponents": jax.ShapeDtypeStruct((batch_size, self.points), jnp.int32),
            "sizes": jax.ShapeDtypeStruct((batch_size, 2), jnp.float32),
            "airy": jax.ShapeDtypeStruct((batch_size, self.rows, 4), jnp.float32),
        }

    def __call__(
        self,
        exponents: Int[Array, "batch points"],
        sizes: Float[Array, "batch 2"],
        airy: Float[Array, "batch rows 4"],
        train: bool = False,
    ) -> Float[Array, "batch 1"]:
        """Logarithms of the numbers.

        Args:
          exponents: of psi, in any order.
          sizes: genus and number of marked points.
          airy: k, a, b and log(1 + 100 B[k, a, b]) of B's entries other than 0.
          train: drop, and normalise by the batch.
        """
        return self.features(exponents, sizes, airy, train)["logits"]

    @nn.compact
    def features(
        self,
        exponents: Int[Array, "batch points"],
        sizes: Float[Array, "batch 2"],
        airy: Float[Array, "batch rows 4"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        self._check(exponents, sizes, airy)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mlp = partial(DynamicMlp, self.hidden, self.channels, self.activation, **types)
        activation = partial(DynamicRange, self.activation, **types)
        encoder = partial(Encoder, self.embed_dim, self.num_heads, self.groups,
                          activation=self.activation, dropout=self.dropout, **types)  # fmt: skip
        valid = jnp.arange(exponents.shape[1]) < sizes[:, 1:]
        entry = airy[..., 3] != 0

        z = mlp(batch_norm=True, name="sizes_mlp")(sizes.astype(self.dtype), train=train)
        points = nn.Embed(self.vocab_size, self.channels, embedding_init=nn.initializers.normal(1),
                          name="embed", **types)(exponents)  # fmt: skip
        points = mlp(name="points_mlp")(points, z[:, None])
        points = activation(name="points_activation")(points)
        rows = mlp(name="rows_mlp")(airy.astype(self.dtype), z[:, None])
        rows = activation(name="rows_activation")(jnp.where(entry[..., None], rows, 0))

        y, first = encoder(distances=False, name="points_encoder")(points, valid, train)
        points = points + y
        y, second = encoder(distances=True, name="rows_encoder")(rows, entry, train)
        rows = rows + y

        pooled = Pool(self.param_dtype, name="rows_pool")(rows)
        pooled = pooled + Pool(self.param_dtype, name="points_pool")(points)
        pooled = activation(name="pooled_activation")(pooled)
        x = jnp.concatenate([pooled, z], -1)
        x = batch_norm("norm", train, **types)(x)
        x = nn.relu(linear(True, self.hidden, "hidden", x, **types))
        plain = {"use_scale": False, "use_bias": False}
        tokens = [
            batch_norm(name, train, **plain)(token.astype(jnp.float32))
            for name, token in (("points_memory_norm", first), ("rows_memory_norm", second))
        ]
        return {
            "sizes": z,
            "points": points,
            "rows": rows,
            "pooled": pooled,
            "alignment": alignment(*tokens),
            "logits": linear(True, 1, "head", x, **types),
        }

    def _check(self, exponents: Array, sizes: Array, airy: Array) -> None:
        batch = exponents.shape[0]
        wanted = {"exponents": (batch, self.points), "sizes": (batch, 2),
                  "airy": (batch, self.rows, 4)}  # fmt: skip
        for (name, shape), x in zip(wanted.items(), (exponents, sizes, airy), strict=True):
            if x.shape != shape:
                raise ValueError(
                    f"This DynamicFormer takes {name} of shape {shape}, not {x.shape}; pad what "
                    "you give, or create it with other points or rows."
                )


# ---------------------------------------------------------------------------- checkpoints

_ENCODER = (
    ("project_in.weight", "embed/kernel"),
    ("attn_layers.layers.0.1.to_q.weight", "query/kernel"),
    ("attn_layers.layers.0.1.to_k.weight", "key/kernel"),
    ("attn_layers.layers.0.1.to_v.weight", "value/kernel"),
    ("attn_layers.layers.0.1.to_out.weight", "out/kernel"),
    ("attn_layers.layers.1.1.ff.0.0.weight", "mlp/up/kernel"),
    ("attn_layers.layers.1.1.ff.2.weight", "mlp/down/kernel"),
    ("project_out.weight", "project/kernel"),
)
_NORMS = (("layers.0.0.0", "norm1"), ("layers.1.0.0", "norm2"), ("final_norm", "norm"))
_DISTANCE = (("0.0", "hidden0"), ("1.0", "hidden1"), ("2", "head"))
_COUNTERS = ("gn_mlp.last_norm", "last_norm", "bn1", "bn2")


def _statistics(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
    ]


def _encoder_rules(theirs: str, ours: str) -> list[Rule]:
    layers = f"{theirs}.attn_layers"
    return [
        Rule(f"{theirs}.memory_tokens", f"{ours}/memory"),
        *(Rule(f"{theirs}.{a}", f"{ours}/{b}", transposed) for a, b in _ENCODER),
        *(Rule(f"{layers}.{a}.g", f"{ours}/{b}/scale") for a, b in _NORMS),
        *activation_rules(f"{layers}.layers.1.1.ff.0.1", f"{ours}/mlp/activation"),
        *(
            rule
            for a, b in _DISTANCE
            for rule in dense_rules(f"{layers}.rel_pos.mlp.{a}", f"{ours}/distance/{b}")
        ),
    ]


LAYOUTS = {
    "official": Rules(
        [
            *mlp_rules("gn_mlp.", "sizes_mlp"),
            Rule("perm_emb.weight", "embed/embedding"),
            *mlp_rules("perm_embedding.", "points_mlp"),
            *mlp_rules("b_embedding.", "rows_mlp"),
            *activation_rules("nonlin_x", "points_activation"),
            *activation_rules("nonlin_b", "rows_activation"),
            *activation_rules("nonlin", "pooled_activation"),
            *_encoder_rules("trans_1", "rows_encoder"),
            *_encoder_rules("trans_2", "points_encoder"),
            Rule("pooling_x.average_n", "points_pool/typical"),
            Rule("pooling_bc.average_n", "rows_pool/typical"),
            *batch_norm_rules("last_norm", "norm"),
            *_statistics("bn1", "points_memory_norm"),
            *_statistics("bn2", "rows_memory_norm"),
            *dense_rules("final_mlp.lin1", "hidden"),
            *dense_rules("final_mlp.lin_final", "head"),
        ],
        derived={
            f"{name}.num_batches_tracked": lambda model: np.zeros((), np.int64)
            for name in _COUNTERS
        },
        fresh=("head/kernel", "head/bias"),
    )
}

# ------------------------------------------------------------------------------- variants

_COMMON = dict(
    module=DynamicFormer,
    task="regression",
    paper="Can Transformers Do Enumerative Geometry?, arXiv 2408.14915",
    code="github.com/Baran-phys/DynamicFormer",
    licence="MIT",
)

VARIANTS = {
    "dynamicformer_psi": Variant(fields={}, params=1_807_975, **_COMMON),
    "dynamicformer_test": Variant(
        fields=dict(points=4, rows=12, vocab_size=20, channels=16, embed_dim=32, num_heads=2,
                    groups=4, hidden=32, dropout=0.0),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, decay=(r".*memory",))
