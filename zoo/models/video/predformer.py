"""PredFormer: the next frames of a video from gated transformers over time and over space.

Tang et al., "PredFormer: Transformers Are Effective Spatial-Temporal Predictive Learners", arXiv
2410.04733. Official code: github.com/yyyujintang/PredFormer (built on OpenSTL; without a licence,
so this is our own code of its mechanism).

T frames become as many future frames at once. Patches are embedded linearly, and a fixed sinusoid
over the flat index `frame * patches + patch` is added once. Then come gated transformers:

    gated(x): depth times  x = x + attention(LN(x))
                           x = x + down(silu(gate(u)) * up(u)),  u = LN(x)
              at last      x = LN(x)

A temporal one sees the T tokens of each place, a spatial one the tokens of each frame, a full one
all. There are nine orders; a letter is one gated transformer, T(emporal) or S(patial):

    FullAttention              one over everything, of depth N
    FacST, FacTS               one S and one T, each of depth N
    Binary_ST, Binary_TS       N layers of two, each of depth 1
    Triplet_STS, Triplet_TST   N layers of three
    Quadruplet_TSST, _STTS     N layers of four

Every gated transformer ends in a LayerNorm, so the residual stream is normalised anew after each.
What the code does and the paper does not say: a patch is read as (row, column, channel) and written
as (channel, row, column); "attention dropout" acts after attention's output matrix. After FacST's
temporal transformer the code takes tokens that lie place by place as if they lay frame by frame,
so the head's output is scattered over the clip; weights were trained so, and it is done here, too.
The code has sums around whole layers in comments ("only for human3.6m"); they are not part of it.

    features         PredFormer_Quadruplet_TSST_mmnist
    embed             10   64  256    patches of 8x8, positions added
    layer1            10   64  256    four gated transformers
    layer2            10   64  256
    layer3            10   64  256
    layer4            10   64  256
    layer5            10   64  256
    layer6            10   64  256
    forecast          10   64   64  1
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, dense_rules, linear, norm_rules
from zoo.layers.classifier import check_pixels
from zoo.layers.decoder import GatedMlp
from zoo.layers.dense import Dense
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import DropPath
from zoo.system import System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts

ORDERS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "FullAttention": (True, ("space_temporal",)),
    "FacST": (True, ("space", "temporal")),
    "FacTS": (True, ("temporal", "space")),
    "Binary_ST": (False, ("st_space", "st_temporal")),
    "Binary_TS": (False, ("ts_temporal", "ts_space")),
    "Triplet_STS": (False, ("space_first", "temporal", "space_second")),
    "Triplet_TST": (False, ("temporal_first", "space", "temporal_second")),
    "Quadruplet_TSST": (False, ("ts_temporal", "ts_space", "st_space", "st_temporal")),
    "Quadruplet_STTS": (False, ("st_space", "st_temporal", "ts_temporal", "ts_space")),
}
"""Official name -> whether its gated transformers stand once, being deep, and their names."""


def positions(length: int, channels: int) -> np.ndarray:
    """Fixed positions `[length, channels]`: sines in even channels, cosines in odd ones.

    The angles are rounded to float32 before the sine is taken, as in the official table.
    """
    rates = 10000.0 ** (2 * (np.arange(channels) // 2) / channels)
    angles = (np.arange(length)[:, None] / rates).astype(np.float32).astype(np.float64)
    even = np.arange(channels) % 2 == 0
    return np.where(even, np.sin(angles), np.cos(angles)).astype(np.float32)


class Attention(nn.Module):
    """Self-attention whose heads have a width of their own; `out` is left out for a single one."""

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool = False
    ) -> Float[Array, "batch length channels"]:
        batch, length, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        inner = self.num_heads * self.head_dim
        qkv = dense(3 * inner, use_bias=False, name="qkv")(x)
        heads = (batch, length, self.num_heads, self.head_dim)
        query, key, value = (
            constrain(t.reshape(heads), "batch", "length", "heads", "head_dim")
            for t in jnp.split(qkv, 3, axis=-1)
        )
        x = kernels_pallas.attention(query, key, value).reshape(batch, length, inner)
        if self.num_heads == 1 and self.head_dim == channels:
            return x
        x = dense(channels, name="out")(x)
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class Block(nn.Module):
    """Attention and a gated MLP, each behind a LayerNorm and a residual connection."""

    num_heads: int
    head_dim: int
    hidden: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool = False
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = LayerNorm(name="norm1", **types)(x)
        y = Attention(
            self.num_heads, self.head_dim, self.attention_dropout, name="attention", **types
        )(y, train)
        x = x + DropPath(self.drop_path)(y, train)
        y = LayerNorm(name="norm2", **types)(x)
        y = GatedMlp(self.hidden, use_bias=True, dropout=self.dropout, name="mlp", **types)(
            y, train
        )
        x = x + DropPath(self.drop_path)(y, train)
        return constrain(x, "batch", "length", "channels")


class GatedTransformer(nn.Module):
    """Blocks over one axis of a clip's tokens, or over all of them, and a LayerNorm.

    Attributes:
      axis: "temporal", "space" or "space_temporal".
      block: the class of the blocks, and what they are made with.
    """

    axis: str
    depth: int
    block: partial
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time places channels"], train: bool = False
    ) -> Float[Array, "batch time places channels"]:
        batch, time, places, _ = x.shape
        there, back = {
            "temporal": ("b t n c -> (b n) t c", "(b n) t c -> b t n c"),
            "space": ("b t n c -> (b t) n c", "(b t) n c -> b t n c"),
            "space_temporal": ("b t n c -> b (t n) c", "b (t n) c -> b t n c"),
        }[self.axis]
        x = rearrange(x, there)
        for i in range(self.depth):
            x = self.block(name=f"layers_{i}")(x, train)
        x = LayerNorm(name="norm", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        sizes = {"b": batch, "t": time, "n": places}
        return rearrange(x, back, **{k: v for k, v in sizes.items() if k in back.split("->")[0]})


class Layer(nn.Module):
    """The gated transformers of one layer, in order; a name says over what each runs."""

    names: tuple[str, ...]
    make: partial

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time places channels"], train: bool = False
    ) -> Float[Array, "batch time places channels"]:
        for name in self.names:
            x = self.make(axis_of(name), name=name)(x, train)
        return x


def axis_of(name: str) -> str:
    """Over what a gated transformer of this official name runs."""
    if name == "space_temporal":
        return name
    return "temporal" if "temporal" in name else "space"


class PredFormer(Model):
    """PredFormer: T frames, and the T frames that follow.

    Attributes:
      clip_size: frames, height and width. Positions are made for it.
      order: a name of `ORDERS`.
      num_layers: N in the module's table (`Ndepth` in the code).
      depth: blocks of each gated transformer, where N counts layers.
      head_dim: width of a head; num_heads * head_dim need not be embed_dim.
      mlp_ratio: hidden over embed_dim (`scale_dim` in the code).
      attention_dropout: rate after attention's output matrix.
      drop_path: stochastic depth, the same in every block.
      remat: recompute blocks in the backward pass; True, or a key of `zoo.layers.stack.REMAT`.
    """

    clip_size: tuple[int, int, int] = (10, 64, 64)
    in_channels: int = 1
    patch_size: int = 8
    order: str = "Quadruplet_TSST"
    num_layers: int = 6
    depth: int = 1
    embed_dim: int = 256
    num_heads: int = 8
    head_dim: int = 32
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, *self.clip_size, self.in_channels)
        return {"frames": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, frames: Float[Array, "batch time height width channels"], train: bool = False
    ) -> Float[Array, "batch time height width channels"]:
        """As many frames as were given, those that follow."""
        return self.features(frames, train)["forecast"]

    @nn.compact
    def features(
        self, frames: Float[Array, "batch time height width channels"], train: bool = False
    ) -> dict[str, Array]:
        """The embedded tokens, those after each layer, and the forecast (see the table above)."""
        check_pixels(self, frames, "frames", normalised=False)
        self._check(frames.shape)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        (time, height, width), p = self.clip_size, self.patch_size
        rows, columns = height // p, width // p
        x = rearrange(frames, "b t (h p) (w q) c -> b t (h w) (p q c)", p=p, q=p)
        dense = partial(Dense, kernel_init=torch_default_init, **types)
        x = dense(self.embed_dim, name="embed")(x.astype(self.dtype))
        table = positions(time * rows * columns, self.embed_dim)
        x = x + jnp.asarray(table.reshape(time, rows * columns, -1), self.dtype)
        out = {"embed": x}

        deep, names = ORDERS[self.order]
        block = partial(
            remat_block(Block, self.remat, static_argnums=(2,)),
            self.num_heads,
            self.head_dim,
            int(self.embed_dim * self.mlp_ratio),
            self.dropout,
            self.attention_dropout,
            self.drop_path,
            **types,
        )
        depth = self.num_layers if deep else self.depth
        make = partial(GatedTransformer, depth=depth, block=block, **types)
        if deep:
            for i, name in enumerate(names):
                x = out[f"layer{i + 1}"] = make(axis_of(name), name=name)(x, train)
            if self.order == "FacST":  # as in the code, which leaves the tokens place by place
                x = x.swapaxes(1, 2).reshape(x.shape)
        else:
            for i in range(self.num_layers):
                x = out[f"layer{i + 1}"] = Layer(names, make, name=f"layers_{i}")(x, train)
        x = LayerNorm(name="norm", **types)(x)
        x = dense(self.in_channels * p * p, name="head")(x)
        sizes = {"h": rows, "c": self.in_channels, "p": p}
        out["forecast"] = rearrange(x, "b t (h w) (c p q) -> b t (h p) (w q) c", **sizes)
        return out

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is none of {', '.join(ORDERS)}.")
        if shape[1:] != (*self.clip_size, self.in_channels):
            frames, height, width = self.clip_size
            raise ValueError(
                f"This PredFormer takes clips of shape (batch, {frames}, {height}, {width}, "
                f"{self.in_channels}), not {shape}; create it with another clip_size."
            )
        if self.clip_size[1] % self.patch_size or self.clip_size[2] % self.patch_size:
            raise ValueError(
                f"Frames of {self.clip_size[1]}x{self.clip_size[2]} are not whole patches of "
                f"{self.patch_size}x{self.patch_size}; choose another patch_size."
            )


def continue_clip(
    model: PredFormer,
    variables: dict,
    frames: Float[Array, "batch time height width channels"],
    horizon: int,
) -> Float[Array, "batch horizon height width channels"]:
    """`horizon` frames after a clip: forecasts of forecasts, the last one cut.

    Args:
      model: the forecaster of T frames from T.
      variables: its variables.
      frames: the T frames before.
      horizon: any positive number of frames.
    """
    steps = -(-horizon // frames.shape[1])

    def step(frames: Array, _: None) -> tuple[Array, Array]:
        following = model.apply(variables, frames).astype(frames.dtype)
        return following, following

    _, blocks = jax.lax.scan(step, frames, None, length=steps)
    return rearrange(blocks, "s b t h w c -> b (s t) h w c")[:, :horizon]


# ---------------------------------------------------------------------------- checkpoints


def _gated_rules(theirs: str, ours: str) -> list[Rule]:
    """One gated transformer; its `{d}` counts blocks."""
    block, here = f"{theirs}.layers.{{d}}", f"{ours}/layers_{{d}}"
    return [
        *norm_rules(f"{theirs}.norm", f"{ours}/norm"),
        *norm_rules(f"{block}.0.norm", f"{here}/norm1"),
        Rule(f"{block}.0.fn.to_qkv.weight", f"{here}/attention/qkv/kernel", linear),
        *dense_rules(f"{block}.0.fn.to_out.0", f"{here}/attention/out"),
        *norm_rules(f"{block}.1.norm", f"{here}/norm2"),
        *dense_rules(f"{block}.1.fn.fc1_g", f"{here}/mlp/gate"),
        *dense_rules(f"{block}.1.fn.fc1_x", f"{here}/mlp/up"),
        *dense_rules(f"{block}.1.fn.fc2", f"{here}/mlp/down"),
    ]


def _official(name: str) -> str:
    """`ts_space` is `ts_space_transformer`, `space_first` is `space_transformer_first`."""
    stem, _, place = name.rpartition("_")
    return f"{stem}_transformer_{place}" if place in ("first", "second") else f"{name}_transformer"


def _rules() -> Rules:
    rules = [
        *dense_rules("to_patch_embedding.1", "embed"),
        *norm_rules("mlp_head.0", "norm"),
        *dense_rules("mlp_head.1", "head"),
    ]
    for deep in (True, False):
        prefix, here = ("", "") if deep else ("blocks.{i}.", "layers_{i}/")
        for name in sorted({n for kind, names in ORDERS.values() if kind is deep for n in names}):
            rules += _gated_rules(prefix + _official(name), here + name)
    return Rules(tuple(rules))


LAYOUTS = {"official": _rules()}

# ------------------------------------------------------------------------------- variants

_DATA = {  # clip, channels, patch, MLP ratio, dropout, drop path, N of deep, of two, three, four
    "mmnist": ((10, 64, 64), 1, 8, 4.0, 0.0, 0.0, (24, 12, 8, 6)),
    "taxibj": ((4, 32, 32), 2, 4, 4.0, 0.1, 0.1, (8, 4, 3, 2)),
    "weather_t2m": ((12, 32, 64), 1, 4, 2.0, 0.1, 0.25, (8, 4, 3, 2)),
    "human": ((4, 256, 256), 3, 8, 4.0, 0.1, 0.1, (12, 6, 4, 3)),
}
_PARAMS = {  # of FullAttention, Fac, Binary, Triplet, Quadruplet
    "mmnist": (25_285_952, 25_286_464, 25_297_728, 25_297_728, 25_297_728),
    "taxibj": (8_434_976, 8_435_488, 8_438_560, 9_491_232, 8_438_560),
    "weather_t2m": (5_272_848, 5_273_360, 5_276_432, 5_934_864, 5_276_432),
    "human": (12_725_696, 12_726_208, 12_731_328, 12_731_328, 12_731_328),
}
_ABOUT = {
    "task": "video_prediction",
    "paper": "PredFormer, arXiv 2410.04733",
    "code": "github.com/yyyujintang/PredFormer",
}


def _variant(order: str, data: str) -> tuple[str, Variant]:
    clip, channels, patch, ratio, dropout, drop_path, layers = _DATA[data]
    kind = 0 if order == "FullAttention" else 1 if order[:3] == "Fac" else len(ORDERS[order][1])
    return f"PredFormer_{order}_{data}", Variant(
        module=PredFormer,
        fields={
            "clip_size": clip,
            "in_channels": channels,
            "patch_size": patch,
            "order": order,
            "num_layers": layers[max(kind - 1, 0)],
            "mlp_ratio": ratio,
            "dropout": dropout,
            "attention_dropout": dropout,
            "drop_path": drop_path,
        },
        params=_PARAMS[data][kind],
        licence="none stated",
        **_ABOUT,
    )


VARIANTS = dict(_variant(order, data) for data in _DATA for order in ORDERS) | {
    "predformer_test": Variant(
        module=PredFormer,
        fields={
            "clip_size": (3, 8, 8),
            "in_channels": 2,
            "patch_size": 4,
            "num_layers": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "head_dim": 6,
            "mlp_ratio": 2.0,
        },
        licence="none: no published weights",
        **_ABOUT,
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
