"""HAT: window attention beside channel attention, and windows whose keys overlap.

Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", CVPR 2023, arXiv
2205.04437, and "HAT: Hybrid Attention Transformer for Image Restoration", arXiv 2309.05239.
Official code: github.com/XPixelGroup/HAT (Apache-2.0), which we follow.

An image `[B, H, W, 3]` in [0, 1] keeps its resolution through the body; only the end enlarges it.

    x0 = conv(image - mean);  x = groups(LN(x0));  x = conv(LN(x)) + x0
    image = mean + conv(enlarge(leaky_relu(conv(x))))          enlarge: conv, pixel shuffle

A group adds to its input the convolution of: hybrid blocks, then one overlapping block.

    hybrid:       x = x + windows(u) + 0.01 channels(u);  x = x + MLP(LN(x))        u = LN(x)
                  channels(u) = y * sigmoid(W2 relu(W1 mean(y))),  y = conv(gelu(conv(u)))
    overlapping:  x = x + out(softmax(q k^T / sqrt(d) + B) v);  x = x + MLP(LN(x))

`windows` is Swin's attention, shifted by half a window in odd blocks of a group. In an overlapping
block the queries of a window of M x M see the keys of (M + o) x (M + o) around it, o = ratio * M.
Keys outside the image are zero vectors that take part in the softmax with their bias alone.

Where paper and code differ: the code numbers the offsets of an overlapping window so that many
indices are negative and wrap around the table. It is still one row an offset, and it decides which
row of a published table belongs to which offset. The code takes sides that are multiples of the
window; its test script reflects the image up to such sides and crops, which `features` does here.

    features         HAT_SRx4
    shallow            64   64   180    one convolution
    group1             64   64   180    6 hybrid blocks, 1 overlapping block, a convolution
    group2             64   64   180
    group3             64   64   180
    group4             64   64   180
    group5             64   64   180
    group6             64   64   180
    deep               64   64   180    LayerNorm, convolution, plus shallow
    image             256  256  3
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import (
    Rule,
    Rules,
    chain,
    conv,
    dense_rules,
    linear,
    norm_rules,
    squeeze,
)
from zoo.layers.classifier import check_pixels
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.position import relative_position_index, resize_table
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import DropPath
from zoo.layers.window import (
    WindowAttention,
    shifted_window_mask,
    window_merge,
    window_partition,
)
from zoo.system import File, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
Conv = partial(nn.Conv, kernel_init=torch_default_init)
init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts
RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, the training images
WIDTH = 64  # channels while the image is enlarged


def overlap_of(window: int, ratio: float) -> int:
    """By how many rows and columns the keys of a window exceed it.

    Raises:
      ValueError: if it is odd, so that the window cannot stand in the middle.
    """
    overlap = int(window * ratio)
    if overlap % 2 or overlap < 0:
        raise ValueError(
            f"overlap_ratio={ratio} makes {overlap} more rows of keys than the window of {window}; "
            "choose a ratio for which int(window_size * overlap_ratio) is even."
        )
    return overlap


def overlapping_position_index(window: int, overlap: int) -> np.ndarray:
    """Row of the bias table `[(2 window + overlap - 1)^2, heads]` of each (query, key).

    Int64 `[window^2, (window + overlap)^2]` as the checkpoints hold it: negative where it wraps.
    """
    wide = window + overlap
    query = np.stack(np.unravel_index(np.arange(window**2), (window, window)), -1)
    key = np.stack(np.unravel_index(np.arange(wide**2), (wide, wide)), -1)
    offset = key[None] - query[:, None] + window - wide + 1
    return offset[..., 0] * (window + wide - 1) + offset[..., 1]


def overlapping_windows(
    x: Float[Array, "batch height width channels"], window: int, overlap: int
) -> Float[Array, "windows keys channels"]:
    """Each window with `overlap / 2` more rows and columns on every side, zeros outside the map."""
    _, height, width, _ = x.shape
    edge = overlap // 2
    x = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    at = np.arange(window + overlap)
    rows = np.arange(0, height, window)[:, None] + at
    columns = np.arange(0, width, window)[:, None] + at
    x = x[:, rows][:, :, :, columns]
    return rearrange(x, "b i h j w c -> (b i j) (h w) c")


def pixel_shuffle(
    x: Float[Array, "batch height width channels"], scale: int
) -> Float[Array, "batch height*scale width*scale channels/scale^2"]:
    """Channels `c * scale^2 + i * scale + j` become pixel (i, j) of channel c, as in PyTorch."""
    return rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=scale, j=scale)


class ChannelAttention(nn.Module):
    """Two convolutions, then each channel scaled by what the mean of all channels says."""

    compress_ratio: int
    squeeze_factor: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        channels = x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        narrow, squeezed = channels // self.compress_ratio, channels // self.squeeze_factor
        if not narrow or not squeezed:
            raise ValueError(
                f"compress_ratio={self.compress_ratio} and squeeze_factor={self.squeeze_factor} "
                f"leave no channel of {channels}; choose numbers up to {channels}."
            )
        y = gelu(Conv(narrow, (3, 3), name="conv1", **types)(x))
        y = Conv(channels, (3, 3), name="conv2", **types)(y)
        dense = partial(nn.Dense, kernel_init=torch_default_init, **types)
        scale = nn.relu(dense(squeezed, name="squeeze")(y.mean((1, 2), keepdims=True)))
        return y * nn.sigmoid(dense(channels, name="excite")(scale))


class HybridBlock(nn.Module):
    """Window attention and channel attention side by side, then an MLP (HAB in the code)."""

    num_heads: int
    window_size: int
    shifted: bool
    compress_ratio: int = 3
    squeeze_factor: int = 30
    conv_scale: float = 0.01
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        size, channels = x.shape[1:3], x.shape[3]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        window = (self.window_size,) * 2
        shift = self.window_size // 2 if self.shifted else 0
        y = LayerNorm(name="norm1", **types)(x)
        local = ChannelAttention(
            self.compress_ratio, self.squeeze_factor, name="channel_attention", **types
        )(y)
        y = jnp.roll(y, (-shift, -shift), (1, 2)) if shift else y
        y = WindowAttention(
            self.num_heads,
            window,
            self.qkv_bias,
            self.scale,
            self.attention_dropout,
            self.dropout,
            name="attention",
            **types,
        )(
            window_partition(y, window),
            shifted_window_mask(size, window, (shift, shift)) if shift else None,
            train,
        )
        y = window_merge(y, size, window)
        y = jnp.roll(y, (shift, shift), (1, 2)) if shift else y
        x = x + DropPath(self.drop_path)(y, train) + self.conv_scale * local
        y = LayerNorm(name="norm2", **types)(x)
        y = Mlp(int(channels * self.mlp_ratio), dropout=self.dropout, name="mlp", **types)(y, train)
        x = x + DropPath(self.drop_path)(y, train)
        return constrain(x, "batch", "height", "width", "channels")


class OverlappingBlock(nn.Module):
    """Attention from windows to wider windows, then an MLP (OCAB in the code). Has no dropout."""

    num_heads: int
    window_size: int
    overlap: int
    mlp_ratio: float = 2.0
    qkv_bias: bool = True
    scale: float | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        size, channels = x.shape[1:3], x.shape[3]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        window = (self.window_size,) * 2
        y = LayerNorm(name="norm1", **types)(x)
        dense = partial(Dense, kernel_init=init, **types)
        qkv = dense(3 * channels, use_bias=self.qkv_bias, name="qkv")(y)
        rows = (2 * self.window_size + self.overlap - 1) ** 2
        table = self.param("relative_position_bias", init, (rows, self.num_heads), self.param_dtype)
        index = overlapping_position_index(self.window_size, self.overlap)
        bias = rearrange(table[index.reshape(-1) % rows], "(q k) n -> n q k", q=len(index))
        query = window_partition(qkv[..., :channels], window)
        key_value = overlapping_windows(qkv[..., channels:], self.window_size, self.overlap)
        query, key, value = (
            rearrange(t, "w l (n d) -> w l n d", n=self.num_heads)
            for t in (query, *jnp.split(key_value, 2, -1))
        )
        y = kernels_pallas.window_attention(query, key, value, bias=bias, scale=self.scale)
        y = window_merge(rearrange(y, "w l n d -> w l (n d)"), size, window)
        x = x + dense(channels, name="out")(y)
        y = LayerNorm(name="norm2", **types)(x)
        x = x + Mlp(int(channels * self.mlp_ratio), name="mlp", **types)(y)
        return constrain(x, "batch", "height", "width", "channels")


def enlargements(upscale: int) -> tuple[int, ...]:
    """Steps that enlarge an image: by 2 as often as needed, or once by 3.

    Raises:
      ValueError: for another number.
    """
    if upscale == 3:
        return (3,)
    if upscale < 1 or upscale & (upscale - 1):
        raise ValueError(f"upscale={upscale} is neither 3 nor a power of two (1, 2, 4, 8).")
    return (2,) * (upscale.bit_length() - 1)


class Group(nn.Module):
    """Hybrid blocks, an overlapping block and a convolution, added to the input (RHAG).

    Attributes:
      blocks: makers of the hybrid blocks `layers_0 ...`.
      overlapping: maker of the overlapping block.
      conv: maker of the convolution, or None.
    """

    blocks: tuple[Callable[..., nn.Module], ...]
    overlapping: Callable[..., nn.Module]
    conv: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        y = x
        for i, block in enumerate(self.blocks):
            y = block(name=f"layers_{i}")(y, train)
        y = self.overlapping(name="overlapping")(y)
        return x + (y if self.conv is None else self.conv(name="conv")(y))


class HAT(Model):
    """Hybrid Attention Transformer: an image `upscale` times as large.

    Attributes:
      image_size: of the training patches. Any size is taken, unless `absolute_position` is on;
        where it is not larger than a window, no block is shifted.
      upscale: 1 (restoration), 3 or a power of two.
      compress_ratio: the convolutions beside attention have channels / compress_ratio.
      squeeze_factor: the bottleneck of channel attention has channels / squeeze_factor.
      conv_scale: weight of that branch.
      overlap_ratio: keys of an overlapping window beyond it, as a part of the window.
      range: pixels are multiplied by it inside (255 in some official settings).
      residual_conv: a convolution at the end of each group and of the body; False: none.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      absolute_position: add a learned table to the tokens (`ape` in the code).
      drop_path: stochastic depth of the last hybrid block; it grows linearly from 0 at the first.
      remat: recompute blocks in the backward pass; True, or a key of `zoo.layers.stack.REMAT`.
    """

    image_size: tuple[int, int] = (64, 64)
    in_channels: int = 3
    upscale: int = 2
    embed_dim: int = 96
    depths: tuple[int, ...] = (6, 6, 6, 6)
    num_heads: tuple[int, ...] = (6, 6, 6, 6)
    window_size: int = 7
    compress_ratio: int = 3
    squeeze_factor: int = 30
    conv_scale: float = 0.01
    overlap_ratio: float = 0.5
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    range: float = 1.0
    residual_conv: bool = True
    absolute_position: bool = False
    patch_norm: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.1
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, *self.image_size, self.in_channels)
        return {"images": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> Float[Array, "batch height*upscale width*upscale in_channels"]:
        """The restored image."""
        return self.features(images, train)["image"]

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above); all but `image` are of the reflected size."""
        check_pixels(self, images, normalised=False)
        self._check(images.shape)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        _, height, width, _ = images.shape
        fill = [(0, -side % self.window_size) for side in (height, width)]
        images = jnp.pad(images, ((0, 0), *fill, (0, 0)), mode="reflect")
        mean = jnp.asarray(RGB_MEAN if self.in_channels == 3 else 0.0, self.dtype)
        x = (images.astype(self.dtype) - mean) * self.range

        out = {}
        x = out["shallow"] = Conv(self.embed_dim, (3, 3), name="embed", **types)(x)
        x = LayerNorm(name="embed_norm", **types)(x) if self.patch_norm else x
        if self.absolute_position:
            shape = (1, x.shape[1] * x.shape[2], self.embed_dim)
            table = self.param("position_embedding", init, shape, self.param_dtype)
            x = x + table.astype(self.dtype).reshape(1, *x.shape[1:])
        x = nn.Dropout(self.dropout)(x, deterministic=not train)

        rates = iter(np.linspace(0.0, self.drop_path, sum(self.depths)).tolist())
        alike = {"mlp_ratio": self.mlp_ratio, "qkv_bias": self.qkv_bias, "scale": self.scale}
        body_conv = partial(Conv, self.embed_dim, (3, 3), **types) if self.residual_conv else None
        moves = min(self.image_size) > self.window_size
        for i, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            hybrid = partial(
                remat_block(HybridBlock, self.remat, static_argnums=(2,)),
                heads,
                self.window_size,
                compress_ratio=self.compress_ratio,
                squeeze_factor=self.squeeze_factor,
                conv_scale=self.conv_scale,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                **alike,
                **types,
            )
            blocks = [
                partial(hybrid, shifted=moves and b % 2 == 1, drop_path=next(rates))
                for b in range(depth)
            ]
            overlapping = partial(
                remat_block(OverlappingBlock, self.remat, static_argnums=()),
                heads,
                self.window_size,
                overlap_of(self.window_size, self.overlap_ratio),
                **alike,
                **types,
            )
            x = Group(tuple(blocks), overlapping, body_conv, name=f"groups_{i}")(x, train)
            out[f"group{i + 1}"] = x
        x = LayerNorm(name="norm", **types)(x)
        x = x if body_conv is None else body_conv(name="conv_body")(x)
        x = out["deep"] = x + out["shallow"]

        x = nn.leaky_relu(Conv(WIDTH, (3, 3), name="conv_before", **types)(x))
        for i, step in enumerate(enlargements(self.upscale)):
            x = Conv(WIDTH * step**2, (3, 3), name=f"enlarge_{i}", **types)(x)
            x = pixel_shuffle(x, step)
        x = Conv(self.in_channels, (3, 3), name="conv_last", **types)(x)
        x = x[:, : height * self.upscale, : width * self.upscale]
        out["image"] = x / self.range + mean
        return out

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[3] != self.in_channels:
            raise ValueError(
                f"This HAT takes images of shape (batch, height, width, {self.in_channels}), not "
                f"{shape}."
            )
        if self.absolute_position and shape[1:3] != self.image_size:
            raise ValueError(
                f"This HAT has a learned position for each pixel of {self.image_size[0]}x"
                f"{self.image_size[1]}, so it cannot take {shape[1]}x{shape[2]}; create it with "
                "another image_size or with absolute_position=False."
            )
        if min(self.image_size) < self.window_size:
            raise ValueError(
                f"image_size={self.image_size} is smaller than a window of {self.window_size}; "
                "choose a larger image_size or a smaller window_size."
            )


# ---------------------------------------------------------------------------- checkpoints


def _resize_position(table: np.ndarray, shape: tuple[int, ...], model: HAT, *_) -> np.ndarray:
    return resize_table(table, model.image_size)


INDICES = {
    "relative_position_index_SA": lambda model: relative_position_index((model.window_size,) * 2),
    "relative_position_index_OCA": lambda model: overlapping_position_index(
        model.window_size, overlap_of(model.window_size, model.overlap_ratio)
    ),
}


def _conv_rules(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", conv),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def _pixel_rules(theirs: str, ours: str) -> list[Rule]:
    """A 1x1 convolution of one pixel is a matrix."""
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", chain(squeeze((2, 3)), linear)),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def _block_rules(theirs: str, attention: str, ours: str, ours_attention: str) -> list[Rule]:
    """What both blocks have: attention with a bias table, two norms, an MLP."""
    table = "relative_position_bias"
    return [
        Rule(f"{attention}.{table}_table", f"{ours_attention}/{table}"),
        *dense_rules(f"{attention}.qkv", f"{ours_attention}/qkv"),
        *dense_rules(f"{attention}.proj", f"{ours_attention}/out"),
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
    ]


_HYBRID = "layers.{g}.residual_group.blocks.{b}", "groups_{g}/layers_{b}"
_OVERLAPPING = "layers.{g}.residual_group.overlap_attn", "groups_{g}/overlapping"
_CHANNELS = f"{_HYBRID[0]}.conv_block.cab", f"{_HYBRID[1]}/channel_attention"

LAYOUTS = {
    "official": Rules(
        (
            Rule("absolute_pos_embed", "position_embedding"),
            *_conv_rules("conv_first", "embed"),
            *norm_rules("patch_embed.norm", "embed_norm"),
            *_block_rules(_HYBRID[0], f"{_HYBRID[0]}.attn", _HYBRID[1], f"{_HYBRID[1]}/attention"),
            *_conv_rules(f"{_CHANNELS[0]}.0", f"{_CHANNELS[1]}/conv1"),
            *_conv_rules(f"{_CHANNELS[0]}.2", f"{_CHANNELS[1]}/conv2"),
            *_pixel_rules(f"{_CHANNELS[0]}.3.attention.1", f"{_CHANNELS[1]}/squeeze"),
            *_pixel_rules(f"{_CHANNELS[0]}.3.attention.3", f"{_CHANNELS[1]}/excite"),
            *_block_rules(_OVERLAPPING[0], _OVERLAPPING[0], _OVERLAPPING[1], _OVERLAPPING[1]),
            *_conv_rules("layers.{g}.conv", "groups_{g}/conv"),
            *norm_rules("norm", "norm"),
            *_conv_rules("conv_after_body", "conv_body"),
            *_conv_rules("conv_before_upsample.0", "conv_before"),
            *(  # convolutions and shuffles take turns
                rule for i in range(8) for rule in _conv_rules(f"upsample.{2 * i}", f"enlarge_{i}")
            ),
            *_conv_rules("conv_last", "conv_last"),
        ),
        derived=INDICES,
        resize={"position_embedding": _resize_position},
    )
}

# ------------------------------------------------------------------------------- variants

_SIZES = {  # channels, groups, compress_ratio, squeeze_factor, multiply-adds of 64x64 at x4
    "HAT-S": (144, 6, 24, 24, 54.9e9),
    "HAT": (180, 6, 3, 30, 102.4e9),
    "HAT-L": (180, 12, 3, 30, None),
}
_PARAMS = {
    "HAT-S": {2: 9_473_471, 3: 9_658_111, 4: 9_621_183},
    "HAT": {2: 20_624_795, 3: 20_809_435, 4: 20_772_507},
    "HAT-L": {2: 40_698_863, 3: 40_883_503, 4: 40_846_575},
}


def _variant(name: str, size: str, upscale: int, metric: str = "") -> tuple[str, Variant]:
    channels, groups, compress, squeezed, flops = _SIZES[size]
    return name, Variant(
        module=HAT,
        fields={
            "upscale": upscale,
            "embed_dim": channels,
            "depths": (6,) * groups,
            "num_heads": (6,) * groups,
            "window_size": 16,
            "compress_ratio": compress,
            "squeeze_factor": squeezed,
            "mlp_ratio": 2.0,
        },
        task="super_resolution",
        params=_PARAMS[size][upscale],
        flops=flops if upscale == 4 else None,
        metric=metric,
        paper="HAT: Hybrid Attention Transformer for Image Restoration, arXiv 2309.05239",
        code="github.com/XPixelGroup/HAT",
        licence="Apache-2.0",
        files=(File(f"{name}.pth"),),
    )


_X4 = {
    "HAT-S": "32.92 dB on Set5, 29.15 Set14, 27.97 BSD100, 27.87 Urban100, 32.35 Manga109",
    "HAT": "33.04 dB on Set5, 29.23 Set14, 28.00 BSD100, 27.97 Urban100, 32.48 Manga109",
}

VARIANTS = dict(
    [
        *(
            _variant(f"{size}_SRx{n}", size, n, _X4[size] if n == 4 else "")
            for size in ("HAT-S", "HAT")
            for n in (2, 3, 4)
        ),
        *(
            _variant(f"{size}_SRx{n}_ImageNet-pretrain", size, n)
            for size in ("HAT", "HAT-L")
            for n in (2, 3, 4)
        ),
        _variant("Real_HAT_GAN_SRx4", "HAT", 4),
        _variant("Real_HAT_GAN_SRx4_sharper", "HAT", 4),
    ]
) | {
    "hat_test": Variant(
        module=HAT,
        fields={
            "image_size": (16, 16),
            "embed_dim": 16,
            "depths": (2,),
            "num_heads": (2,),
            "window_size": 4,
            "compress_ratio": 2,
            "squeeze_factor": 4,
            "conv_scale": 0.1,
            "mlp_ratio": 2.0,
            "drop_path": 0.0,
        },
        task="super_resolution",
        paper="HAT: Hybrid Attention Transformer for Image Restoration, arXiv 2309.05239",
        code="github.com/XPixelGroup/HAT",
        licence="none: no published weights",
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, depth=r"groups_(\d+)")
