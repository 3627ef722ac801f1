"""CSWin Transformer: half of the heads attend in vertical stripes, half in horizontal ones.

Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
CVPR 2022, arXiv 2107.00652. Official code: github.com/microsoft/CSWin-Transformer (MIT), which we
follow.

A block works on a map `x [B, H, W, C]`:

    x = x + DropPath(cross(LN(x)));   x = x + DropPath(MLP(LN(x)))
    q, k, v = qkv(x), each cut into two halves of channels, one a branch
    branch 0 attends inside stripes of sw columns, branch 1 inside stripes of sw rows:
        softmax(q k^T / sqrt(d)) v + LePE(v)             LePE: depthwise 3x3 convolution of v
    cross(x) = out([branch 0 | branch 1])

LePE is cut at the borders of its stripe, with zeros outside. The last stage, and a stage whose map
is as large as its stripe is wide, has one branch over the whole map. (The paper draws a projection
for each branch; the code has one, cut behind it.) There is no other position.

    features         CSWin_64_12211_tiny_224
    patch_embed      56  56   64    stride 4: 7x7 convolution, LayerNorm
    stage1           56  56   64    1 block, stripes of 1
    downsample1      28  28  128    3x3 convolution of stride 2, LayerNorm
    stage2           28  28  128    2 blocks, stripes of 2; stride 8
    downsample2      14  14  256
    stage3           14  14  256    21 blocks, stripes of 7; stride 16
    downsample3       7   7  512
    stage4            7   7  512    1 block, the whole map; stride 32
    norm              7   7  512
    pooled                   512    mean over the map
    logits                  1000

Images of every size are taken, as in the authors' segmentation code: a branch whose stripes do not
fit pads queries, keys and values with zeros, half on each side, and padded keys take part. Sizes
change no parameter but the number of branches, which follows `image_size`.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, conv_rules, dense_rules, norm_rules
from zoo.layers.block import ResidualBlock
from zoo.layers.classifier import ImageClassifier
from zoo.layers.conv import DepthwiseConv
from zoo.layers.dense import Dense
from zoo.layers.hierarchy import ConvMerging, Stage
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import drop_path_rates
from zoo.layers.window import window_merge, window_partition
from zoo.system import File, Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts


class StripeAttention(nn.Module):
    """Attention inside stripes, plus a convolution of the values (LePE).

    Attributes:
      num_heads: of this branch.
      stripe: rows and columns of a stripe; 0 stands for the whole axis.
    """

    num_heads: int
    stripe: tuple[int, int]
    scale: float | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, qkv: Float[Array, "batch height width qkv"]
    ) -> Float[Array, "batch height width channels"]:
        """`qkv` holds queries, keys and values, each head-major."""
        height, width = qkv.shape[1:3]
        rows, columns = self.stripe[0] or height, self.stripe[1] or width
        (top, below), (left, right) = _halves(-height % rows), _halves(-width % columns)
        qkv = jnp.pad(qkv, ((0, 0), (top, below), (left, right), (0, 0)))
        size = qkv.shape[1:3]
        stripes = window_partition(qkv, (rows, columns))
        x = kernels_pallas.window_attention(stripes, num_heads=self.num_heads, scale=self.scale)
        value = jnp.split(stripes, 3, axis=-1)[2].reshape(-1, rows, columns, x.shape[-1])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x + DepthwiseConv(name="pos_conv", **types)(value).reshape(x.shape)
        x = window_merge(x, size, (rows, columns))
        return x[:, top : top + height, left : left + width]


def _halves(padding: int) -> tuple[int, int]:
    return padding // 2, padding - padding // 2


class CrossAttention(nn.Module):
    """Attention in a cross of two stripes, or over the whole map.

    Attributes:
      stripe_width: of both branches; None: one branch that sees the whole map.
    """

    num_heads: int
    stripe_width: int | None
    qkv_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        channels, width = x.shape[-1], self.stripe_width
        stripes = [(0, 0)] if width is None else [(0, width), (width, 0)]
        if self.num_heads % len(stripes) or channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not fit {channels} channels in {len(stripes)} "
                "branches; choose a divisor of the channels, even where there are two branches."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        qkv = dense(3 * channels, use_bias=self.qkv_bias, name="qkv")(x)
        qkv = constrain(qkv, "batch", "height", "width", "channels")
        qkv = qkv.reshape(*x.shape[:3], 3, len(stripes), -1)
        branches = [
            StripeAttention(
                self.num_heads // len(stripes), stripe, self.scale, name=f"branch_{i}", **types
            )(qkv[..., i, :].reshape(*x.shape[:3], -1))
            for i, stripe in enumerate(stripes)
        ]
        x = dense(channels, name="out")(jnp.concatenate(branches, axis=-1))
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class CSWin(ImageClassifier):
    """CSWin Transformer classifier.

    Attributes:
      image_size: of `example_inputs`; it also says which stages have one branch. Images of every
        other size are taken too.
      stripe_widths: sw of each stage; the last stage attends globally whatever its number says.
      num_heads: of both branches together.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    embed_dim: int = 64
    depths: tuple[int, ...] = (1, 2, 21, 1)
    stripe_widths: tuple[int, ...] = (1, 2, 7, 7)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0

    def is_global(self, stage: int) -> bool:
        """Whether the blocks of a stage have one branch that sees the whole map."""
        size = tuple((side + 1) // 4 for side in self.image_size)  # of the 7x7 convolution
        for _ in range(stage):
            size = tuple((side + 1) // 2 for side in size)
        width = self.stripe_widths[stage]
        return stage == len(self.depths) - 1 or size == (width, width)

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid, before merging."""
        self.check_images(images)
        self._check(images.shape)
        types = self.types
        out = {}
        x = nn.Conv(
            self.embed_dim,
            (7, 7),
            strides=4,
            padding=2,
            kernel_init=torch_default_init,
            name="embed",
            **types,
        )(images)
        x = out["patch_embed"] = LayerNorm(name="embed_norm", **types)(x)

        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        rates = drop_path_rates(self.drop_path, self.depths)
        for i, num_heads in enumerate(self.num_heads):
            attention = partial(
                CrossAttention,
                num_heads,
                None if self.is_global(i) else self.stripe_widths[i],
                self.qkv_bias,
                self.scale,
                self.dropout,
                name="attention",
                **types,
            )
            hidden = int(x.shape[-1] * self.mlp_ratio)
            mlp = partial(Mlp, hidden, dropout=self.dropout, name="mlp", **types)
            last = i == len(self.depths) - 1
            stage = Stage(
                tuple(partial(block, attention, mlp, drop_path=r, **types) for r in rates[i]),
                None if last else partial(ConvMerging, 2 * x.shape[-1], **types),
                name=f"stages_{i}",
            )
            out[f"stage{i + 1}"], merged = stage(x, train)
            if not last:
                x = out[f"downsample{i + 1}"] = merged
        x = out["norm"] = LayerNorm(name="norm", **types)(out[f"stage{len(self.depths)}"])
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, init)
        return out

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[3] != self.in_channels or min(shape[1:3]) < 3:
            raise ValueError(
                f"This CSWin takes images of shape (batch, height, width, {self.in_channels}), "
                f"at least 3x3, not {shape}."
            )
        if not len(self.depths) == len(self.num_heads) == len(self.stripe_widths):
            raise ValueError(
                f"depths={self.depths}, num_heads={self.num_heads} and stripe_widths="
                f"{self.stripe_widths} need one number a stage."
            )


# ---------------------------------------------------------------------------- checkpoints


def _rules(norm: str = "norm") -> list[Rule]:
    rules = [
        *conv_rules("stage1_conv_embed.0", "embed"),
        *norm_rules("stage1_conv_embed.2", "embed_norm"),
    ]
    theirs, ours = "stage{s+1}.{b}", "stages_{s}/layers_{b}"
    position = f"{ours}/attention/branch_{{i}}/pos_conv"
    rules += [
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *dense_rules(f"{theirs}.qkv", f"{ours}/attention/qkv"),
        *conv_rules(f"{theirs}.attns.{{i}}.get_v", f"{position}"),
        *dense_rules(f"{theirs}.proj", f"{ours}/attention/out"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
        *conv_rules("merge{s+1}.conv", "stages_{s}/downsample/conv"),
        *norm_rules("merge{s+1}.norm", "stages_{s}/downsample/norm"),
        *norm_rules(norm, "norm"),
        *dense_rules("head", "head"),
    ]
    return rules


LAYOUTS = {
    "official": Rules(tuple(_rules()), fresh=("head/kernel", "head/bias")),
    "segmentation": Rules(  # a norm of each stage's map; the last one's is the classifier's
        tuple(_rules("norm4")),
        unused=("norm1.*", "norm2.*", "norm3.*"),
        fresh=("head/kernel", "head/bias"),
    ),
}

# ------------------------------------------------------------------------------- variants


def _variant(
    name: str,
    file: str,
    top1: float | None,
    params: int,
    gflops: float | None,
    drop_path: float,
    **fields,
) -> tuple[str, Variant]:
    """A model under its official name, which states width, depths, size and resolution.

    (The name for 22k classes is ours: the authors pass their number.)
    """
    width = int(name.split("_")[1])
    depths = {"12211": (1, 2, 21, 1), "24322": (2, 4, 32, 2)}[name.split("_")[2]]
    resolution = int(name.split("_")[4])
    last = 7 if resolution == 224 else 12
    return name, Variant(
        module=CSWin,
        fields={
            "image_size": (resolution, resolution),
            "embed_dim": width,
            "depths": depths,
            "stripe_widths": (1, 2, last, last),
            "num_heads": {64: (2, 4, 8, 16), 96: (4, 8, 16, 32), 144: (6, 12, 24, 24)}[width],
            "drop_path": drop_path,
            **fields,
        },
        task="image_classification",
        params=params,
        flops=gflops and gflops * 1e9,
        metric=f"ImageNet-1K top-1 {top1} %" if top1 else "",
        paper="CSWin Transformer, arXiv 2107.00652",
        code="github.com/microsoft/CSWin-Transformer",
        licence="MIT",
        files=(File(f"{file}.pth"),),
        preprocessing=Preprocessing(crop=0.9 if resolution == 224 else 1.0),
    )


VARIANTS = dict(
    (
        _variant("CSWin_64_12211_tiny_224", "cswin_tiny_224", 82.8, 22_320_552, 4.3, 0.2),
        _variant("CSWin_64_24322_small_224", "cswin_small_224", 83.6, 34_643_304, 6.9, 0.4),
        _variant("CSWin_96_24322_base_224", "cswin_base_224", 84.2, 77_382_184, 15.0, 0.5),
        _variant("CSWin_96_24322_base_384", "cswin_base_384", 85.5, 77_382_184, 47.0, 0.7),
        _variant("CSWin_144_24322_large_224", "cswin_large_224", 86.5, 173_262_664, 31.5, 0.2),
        _variant(
            "CSWin_144_24322_large_224_22k",
            "cswin_large_22k_224",
            None,
            197_292_337,
            31.5,
            0.2,
            num_classes=21841,
        ),
        _variant("CSWin_144_24322_large_384", "cswin_large_384", 87.5, 173_262_664, 96.8, 0.2),
    )
) | {
    "cswin_test": Variant(
        module=CSWin,
        fields={
            "image_size": (32, 32),
            "num_classes": 10,
            "embed_dim": 24,
            "depths": (1, 1, 1, 1),
            "stripe_widths": (1, 2, 2, 1),
            "num_heads": (2, 2, 4, 4),
        },
        task="image_classification",
        paper="CSWin Transformer, arXiv 2107.00652",
        code="github.com/microsoft/CSWin-Transformer",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0),
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
