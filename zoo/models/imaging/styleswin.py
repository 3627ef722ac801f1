"""StyleSwin: a generator of images from window attention, and a discriminator of wavelets.

Zhang et al., "StyleSwin: Transformer-based GAN for High-resolution Image Generation", CVPR 2022,
arXiv 2112.10762. Official code: github.com/microsoft/StyleSwin (MIT), which we follow.

Generator. Noise z is mapped to a style w by `z / rms(z)` and 8 linear layers. A learned map of 4x4
passes two blocks, is doubled in size, passes two blocks, and so on up to the image; each stage adds
its colours to an image that is doubled alike. A block is

    u = AdaIN(x, w);  x = x + out([windows(q1, k1, v1), shifted_windows(q2, k2, v2)])
    x = x + MLP(AdaIN(x, w));        AdaIN(x, w) = gamma(w) (x - mean) / deviation + beta(w)

where q, k, v of u are cut into two halves of the channels, one for plain windows of 8x8 and one for
windows shifted by half of that. Means are over the map, for each channel. Maps up to 8x8 are one
window. Doubling is bilinear, then LayerNorm, a matrix, and `alpha` times fixed sinusoids.

Discriminator. It sees the Haar wavelets of an image at every scale: 12 channels of half the size.
Levels of two convolutions halve the map down to 4x4; the deviation over groups of the batch is one
more channel; two linear layers give a logit. Official training normalises the weights spectrally.

Layers of both are "equalised": weights are drawn with deviation one and scaled when used.
Where paper and code differ: AdaIN's gamma has no one added, and the constant has no positions.
Images are scaled by ImageNet's mean and deviation, which `to_pixels` undoes.

    features         StyleSwin_256
    latent                 512    the style
    stage1       8   8   512    after doubling
    stage2      16  16   512
    stage3      32  32   512
    stage4      64  64   512
    stage5     128 128   256
    stage6     256 256   128
    stage7     256 256   128    the last stage is not doubled
    image      256 256   3
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
    reshape,
    squeeze,
    transpose,
)
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.position import relative_position_index
from zoo.layers.stack import remat_block
from zoo.layers.window import position_bias, shifted_window_mask, window_merge, window_partition
from zoo.system import File, System, Variant

init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts
BLUR = np.outer([1.0, 3, 3, 1], [1.0, 3, 3, 1]).astype(np.float32) / 64
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_pixels(images: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """Generated images as RGB in [0, 1]."""
    return jnp.clip(images * np.float32(DEVIATION) + np.float32(MEAN), 0, 1)


def channels_of(size: int, base: int, multiplier: int) -> int:
    """Channels of maps of this size: `base` up to 32, then half as many at each doubling."""
    return base if size <= 32 else base * 32 // size * multiplier


def filter_map(
    x: Float[Array, "batch height width channels"],
    kernel: np.ndarray,
    up: int = 1,
    down: int = 1,
    pad: tuple[int, int] = (0, 0),
) -> Float[Array, "batch rows columns channels"]:
    """Zeros between pixels, a border, a convolution of each channel, and every down-th pixel.

    Args:
      x: maps.
      kernel: 2-D; it is a true convolution, so the kernel is flipped.
      up: pixels get up - 1 zeros after them, on both axes.
      down: every so many-th row and column is kept.
      pad: zeros before and after, on both axes; negative numbers are not allowed.
    """
    batch = x.shape[0]
    single = rearrange(x, "b h w c -> (b c) h w 1")
    y = jax.lax.conv_general_dilated(
        single,
        jnp.asarray(kernel[::-1, ::-1, None, None], x.dtype),
        (down, down),
        [(pad[0], pad[1] + up - 1)] * 2,
        lhs_dilation=(up, up),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return rearrange(y, "(b c) h w 1 -> b h w c", b=batch)


def haar_kernels() -> dict[str, np.ndarray]:
    """The four kernels of the Haar wavelets, 2x2."""
    low, high = np.float32([1, 1]) / np.sqrt(np.float32(2)), np.float32([-1, 1]) / np.sqrt(2)
    pairs = {"ll": (low, low), "lh": (high, low), "hl": (low, high), "hh": (high, high)}
    return {name: np.outer(*pair).astype(np.float32) for name, pair in pairs.items()}


def to_wavelets(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height/2 width/2 4*channels"]:
    """Haar wavelets: means, and differences along rows, columns and both."""
    return jnp.concatenate([filter_map(x, k, down=2) for k in haar_kernels().values()], -1)


def from_wavelets(
    x: Float[Array, "batch height width 4*channels"],
) -> Float[Array, "batch 2*height 2*width channels"]:
    """The inverse of `to_wavelets`."""
    signs = (1, -1, -1, 1)
    bands = zip(jnp.split(x, 4, -1), haar_kernels().values(), signs, strict=True)
    return sum(filter_map(band, sign * k, up=2, pad=(1, 0)) for band, k, sign in bands)


def sinusoid_grid(size: int, channels: int) -> Float[np.ndarray, "size size channels"]:
    """Fixed positions: sines and cosines of the column, then of the row; both count from one."""
    half = channels // 4
    rates = np.exp(np.arange(half) * -(np.log(10000.0) / max(half - 1, 1)))
    angles = np.arange(1, size + 1)[:, None] * rates
    axis = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    shape = (size, size, 2 * half)
    parts = np.broadcast_to(axis[None], shape), np.broadcast_to(axis[:, None], shape)
    return np.concatenate(parts, -1).astype(np.float32)


def leaky(x: Array) -> Array:
    """Leaky ReLU of slope 0.2, scaled to keep the variance."""
    return nn.leaky_relu(x, 0.2) * np.sqrt(2).astype(np.float32)


# ------------------------------------------------------------------------------- generator


class EqualDense(nn.Module):
    """A linear map whose weights are scaled when used.

    Attributes:
      rate: factor of the learning rate: weights are drawn so much larger and used so much smaller.
      activate: whether `leaky` follows.
    """

    features: int
    rate: float = 1.0
    activate: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch features"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param(
            "kernel", nn.initializers.normal(1 / self.rate), shape, self.param_dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        kernel = (kernel * (self.rate / x.shape[-1] ** 0.5)).astype(self.dtype)
        y = x.astype(self.dtype) @ kernel + (bias * self.rate).astype(self.dtype)
        return leaky(y) if self.activate else y


class AdaptiveNorm(nn.Module):
    """Each channel normalised over the map, then scaled and shifted by the style."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        style: Float[Array, "batch style"],
    ) -> Float[Array, "batch height width channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        both = EqualDense(2 * x.shape[-1], name="style", **types)(style)
        gamma, beta = jnp.split(both[:, None, None], 2, -1)
        y = x.astype(jnp.float32)
        mean = y.mean((1, 2), keepdims=True)
        variance = ((y - mean) ** 2).mean((1, 2), keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + 1e-5)
        return gamma * y.astype(self.dtype) + beta


class WindowBias(nn.Module):
    """The bias table of one half of the heads, as `[heads, tokens, tokens]`."""

    window: int
    num_heads: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "heads tokens tokens"]:
        rows = (2 * self.window - 1) ** 2
        table = self.param("relative_position_bias", init, (rows, self.num_heads), self.param_dtype)
        return position_bias(table, (self.window,) * 2)


class Block(nn.Module):
    """Plain and shifted windows side by side, then an MLP, both behind adaptive norms."""

    num_heads: int
    window: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        style: Float[Array, "batch style"],
        train: bool = False,
    ) -> Float[Array, "batch height width channels"]:
        size, channels = x.shape[1:3], x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        window = (self.window,) * 2
        y = AdaptiveNorm(name="norm1", **types)(x, style)
        dense = partial(Dense, kernel_init=init, **types)
        qkv = dense(3 * channels, use_bias=self.qkv_bias, name="qkv")(y)
        heads, half = self.num_heads // 2, channels // 2
        parts = rearrange(qkv, "b h w (three two c) -> two b h w (three c)", three=3, two=2)
        outs = []
        for i, part in enumerate(parts):
            shift = self.window // 2 if i and self.window < min(size) else 0
            part = jnp.roll(part, (-shift, -shift), (1, 2)) if shift else part
            part = kernels_pallas.window_attention(
                window_partition(part, window),
                num_heads=heads,
                bias=WindowBias(self.window, heads, self.param_dtype, name=f"attention_{i}")(),
                mask=shifted_window_mask(size, window, (shift, shift)) if shift else None,
                scale=self.scale,
            )
            part = window_merge(part, size, window)
            outs.append(jnp.roll(part, (shift, shift), (1, 2)) if shift else part)
        assert outs[0].shape[-1] == half
        x = x + dense(channels, name="out")(jnp.concatenate(outs, -1))
        y = AdaptiveNorm(name="norm2", **types)(x, style)
        mlp = Mlp(int(channels * self.mlp_ratio), dropout=self.dropout, name="mlp", **types)
        return constrain(x + mlp(y, train), "batch", "height", "width", "channels")


class Double(nn.Module):
    """A map of twice the size: bilinear, LayerNorm, a matrix, and `alpha` times fixed positions."""

    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch size size in_channels"]
    ) -> Float[Array, "batch 2*size 2*size channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, size, _, channels = x.shape
        x = jax.image.resize(x, (batch, 2 * size, 2 * size, channels), "bilinear")
        x = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        x = Dense(self.channels, use_bias=False, kernel_init=init, name="reduction", **types)(x)
        alpha = self.param("alpha", nn.initializers.zeros, (1,), self.param_dtype)
        table = jnp.asarray(sinusoid_grid(2 * size, self.channels), self.dtype)
        return x + table * alpha.astype(self.dtype)


class Stage(nn.Module):
    """Two blocks and, but for the last stage, the doubling."""

    block: Callable[..., nn.Module]
    double: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch size size channels"],
        style: Float[Array, "batch style"],
        train: bool = False,
    ) -> Array:
        for i in range(2):
            x = self.block(name=f"layers_{i}")(x, style, train)
        return x if self.double is None else self.double(name="upsample")(x)


class Generator(Model):
    """StyleSwin's generator: noise to an image.

    Attributes:
      size: of the image, a power of two.
      channel_multiplier: of the channels of maps above 32x32.
      base_channels: of the maps up to 32x32.
      mapping_rate: factor of the learning rate of the mapping (`lr_mlp`).
      full_resolution: maps up to this size are one window.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      remat: recompute blocks in the backward pass; True, or a key of `zoo.layers.stack.REMAT`.
    """

    size: int = 256
    style_dim: int = 512
    mapping_layers: int = 8
    channel_multiplier: int = 2
    base_channels: int = 512
    mapping_rate: float = 0.01
    full_resolution: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return {"noise": jax.ShapeDtypeStruct((batch_size, self.style_dim), jnp.float32)}

    def __call__(
        self,
        noise: Float[Array, "batch style"],
        train: bool = False,
        truncation: float = 1.0,
        mean_latent: Float[Array, "1 style"] | None = None,
    ) -> Float[Array, "batch size size 3"]:
        """An image, scaled by ImageNet's mean and deviation (see `to_pixels`)."""
        return self.features(noise, train, truncation, mean_latent)["image"]

    @nn.compact
    def features(
        self,
        noise: Float[Array, "batch style"],
        train: bool = False,
        truncation: float = 1.0,
        mean_latent: Float[Array, "1 style"] | None = None,
    ) -> dict[str, Array]:
        """The style, the map of each stage and the image.

        Args:
          noise: normal numbers.
          train: whether dropout is on.
          truncation: styles are drawn towards `mean_latent` by this factor, below one.
          mean_latent: the mean style of much noise.
        """
        sizes = generator_sizes(self.size)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = noise.astype(self.dtype)
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-8)
        for i in range(self.mapping_layers):
            x = EqualDense(self.style_dim, self.mapping_rate, True, name=f"mapping_{i}", **types)(x)
        if truncation < 1:
            if mean_latent is None:
                raise ValueError(
                    f"truncation={truncation} needs mean_latent=, the mean style of much noise."
                )
            x = mean_latent + truncation * (x - mean_latent)
        out = {"latent": x}
        style = x

        shape = (1, 4, 4, self.base_channels)
        x = self.param("constant", nn.initializers.normal(1.0), shape, self.param_dtype)
        x = jnp.broadcast_to(x.astype(self.dtype), (noise.shape[0], *shape[1:]))
        image = None
        for i, size in enumerate(sizes):
            channels = channels_of(size, self.base_channels, self.channel_multiplier)
            last = size == self.size
            block = partial(
                remat_block(Block, self.remat, static_argnums=(3,)),
                max(channels // 32, 4),
                size if size <= self.full_resolution else 8,
                self.mlp_ratio,
                self.qkv_bias,
                self.scale,
                self.dropout,
                **types,
            )
            following = channels_of(2 * size, self.base_channels, self.channel_multiplier)
            double = None if last else partial(Double, following, **types)
            x = Stage(block, double, name=f"stages_{i}")(x, style, train)
            out[f"stage{i + 1}"] = x
            colours = ToRGB(name=f"to_rgb_{i}", **types)(x)
            if image is not None:
                image = image if last else filter_map(image, BLUR * 4, up=2, pad=(2, 1))
                colours = colours + image
            image = colours
        out["image"] = image
        return out


class ToRGB(nn.Module):
    """A matrix of the channels, with two biases as in published files."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width 3"]:
        deviation = 0.02 * (2 / (x.shape[-1] + 3)) ** 0.5
        x = Dense(3, kernel_init=nn.initializers.normal(deviation), name="conv",
                  dtype=self.dtype, param_dtype=self.param_dtype)(x)  # fmt: skip
        bias = self.param("bias", nn.initializers.zeros, (3,), self.param_dtype)
        return x + bias.astype(self.dtype)


def generator_sizes(size: int) -> list[int]:
    """Sizes of the maps: 4, 8, ... size.

    Raises:
      ValueError: if it is no power of two from 8 to 1024.
    """
    sizes = [2**i for i in range(2, 11)]
    if size not in sizes[1:]:
        raise ValueError(f"size={size} is no power of two from 8 to 1024.")
    return sizes[: sizes.index(size) + 1]


# --------------------------------------------------------------------------- discriminator


class ScaledConv(nn.Module):
    """A convolution, or a matrix (`window` 0), with its weights equalised or spectrally normalised.

    Attributes:
      window: rows and columns of the kernel; 0: a matrix.
      halve: blur, then keep every second row and column.
      spectral: divide weights by their largest singular value. Its singular vectors `u` and `v` are
        in `batch_stats`; in training, when that collection is mutable, they take one step.
      bias: a bias before the activation, beside the activation's own.
      activate: whether a bias and `leaky` follow.
    """

    features: int
    window: int
    halve: bool = False
    spectral: bool = False
    bias: bool = False
    activate: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shape = (*(self.window,) * (2 if self.window else 0), x.shape[-1], self.features)
        fan_in = int(np.prod(shape[:-1]))
        if self.spectral:
            start = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            kernel = self.param("raw_kernel", start, shape, self.param_dtype)
            kernel = kernel / self._largest(kernel.astype(jnp.float32), fan_in, train)
        else:
            kernel = self.param("kernel", nn.initializers.normal(1.0), shape, self.param_dtype)
            kernel = kernel / fan_in**0.5
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        if self.window:
            if self.halve:
                x = filter_map(x, BLUR, pad=(2, 2))
            pad = [(0, 0) if self.halve else (self.window // 2,) * 2] * 2
            x = jax.lax.conv_general_dilated(
                x, kernel, (2 if self.halve else 1,) * 2, pad,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
        else:
            x = x @ kernel
        zeros = partial(self.param, init_fn=nn.initializers.zeros)
        if self.bias:
            x = x + zeros("bias", shape=(self.features,)).astype(self.dtype)
        if self.activate:
            x = leaky(x + zeros("activation_bias", shape=(self.features,)).astype(self.dtype))
        return x

    def _largest(self, kernel: Array, fan_in: int, train: bool) -> Array:
        """The largest singular value, by the power method, of `[out, in rows columns]`."""
        matrix = jnp.moveaxis(kernel, (-1, -2), (0, 1)).reshape(self.features, fan_in)

        def unit(x: Array) -> Array:
            return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)

        def draw(size: int) -> Array:
            return unit(jax.random.normal(self.make_rng("params"), (size,)))

        u = self.variable("batch_stats", "u", draw, self.features)
        v = self.variable("batch_stats", "v", draw, fan_in)
        fixed = jax.lax.stop_gradient(matrix)
        ours = u.value, v.value
        if train and self.is_mutable_collection("batch_stats"):
            right = unit(fixed.T @ ours[0])
            ours = unit(fixed @ right), right
            u.value, v.value = ours
        return ours[0] @ (matrix @ ours[1])


class Discriminator(Model):
    """StyleSwin's discriminator: an image to a logit, above zero for a real one.

    Attributes:
      size: of the image, a power of two from 16.
      channel_multiplier: of the channels of maps above 32x32.
      spectral: normalise the weights spectrally (`--D_sn`).
      group: examples over which the deviation is taken; a batch is that many times another number,
        or smaller.
    """

    size: int = 256
    channel_multiplier: int = 2
    base_channels: int = 512
    spectral: bool = True
    group: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.size, self.size, 3)
        return {"images": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, images: Float[Array, "batch size size 3"], train: bool = False
    ) -> Float[Array, "batch 1"]:
        """The logit of each image."""
        return self.features(images, train)["logits"]

    @nn.compact
    def features(
        self, images: Float[Array, "batch size size 3"], train: bool = False
    ) -> dict[str, Array]:
        """The map after each level (`level1 ...`) and the logits."""
        if (
            images.shape[1:] != (self.size, self.size, 3)
            or self.size not in generator_sizes(1024)[2:]
        ):
            raise ValueError(
                f"This discriminator takes images of shape (batch, {self.size}, {self.size}, 3), "
                f"a power of two from 16 to 1024, not {images.shape}."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layer = partial(ScaledConv, spectral=self.spectral, **types)
        width = partial(channels_of, base=self.base_channels, multiplier=self.channel_multiplier)
        bands, x, out = to_wavelets(images.astype(self.dtype)), None, {}
        size, channels, i = self.size // 2, width(self.size), 0
        while size > 4:
            bands, x = self._add(layer, bands, x, i, channels, train)
            following = width(size // 2)
            x = layer(channels, 3, name=f"conv_{i}_1")(x, train)
            x = layer(following, 3, halve=True, name=f"conv_{i}_2")(x, train)
            out[f"level{i + 1}"] = x
            size, channels, i = size // 2, following, i + 1
        _, x = self._add(layer, bands, x, i, width(4), train)
        x = jnp.concatenate([x, self._deviation(x)], -1)
        x = layer(width(4), 3, name="final_conv")(x, train)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        if self.spectral:
            x = layer(width(4), 0, bias=True, name="final_1")(x, train)
            x = layer(1, 0, bias=True, activate=False, name="final_2")(x, train)
        else:
            x = EqualDense(width(4), activate=True, name="dense_1", **types)(x)
            x = EqualDense(1, name="dense_2", **types)(x)
        out["logits"] = x
        return out

    def _add(
        self, layer: partial, bands: Array, x: Array | None, i: int, channels: int, train: bool
    ) -> tuple[Array, Array]:
        """The wavelets at this level, and the map with what they show added."""
        if x is not None:
            bands = to_wavelets(filter_map(from_wavelets(bands), BLUR, down=2, pad=(1, 1)))
        y = layer(channels, 1, name=f"from_rgb_{i}")(bands, train)
        return bands, y if x is None else x + y

    def _deviation(self, x: Float[Array, "batch rows columns channels"]) -> Array:
        """One channel: the mean deviation over the group that an example belongs to."""
        batch = x.shape[0]
        group = min(batch, self.group)
        if batch % group:
            raise ValueError(
                f"A batch of {batch} cannot be cut into groups of {group}; choose a multiple of it."
            )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        parts = x.astype(wide).reshape(group, batch // group, *x.shape[1:])
        deviation = jnp.sqrt(parts.var(0) + 1e-8).mean((1, 2, 3))
        deviation = jnp.tile(deviation, group)[:, None, None, None]
        return jnp.broadcast_to(deviation, (*x.shape[:3], 1)).astype(x.dtype)


# ---------------------------------------------------------------------------- checkpoints


def _stage(model: nn.Module, s: int) -> tuple[int, int]:
    size = 2 ** (s + 2)
    return size, size if size <= model.full_resolution else 8


def _index(model: nn.Module, s: int, b: int, a: int) -> np.ndarray:
    return relative_position_index((_stage(model, s)[1],) * 2)


def _mask(model: nn.Module, s: int, b: int) -> np.ndarray | None:
    size, window = _stage(model, s)
    shift = window // 2
    return shifted_window_mask((size,) * 2, (window,) * 2, (shift,) * 2) if window < size else None


def _not_last(value: np.ndarray) -> Callable[..., np.ndarray | None]:
    return lambda model, s: value if 2 ** (s + 2) < model.size else None


def _band(name: str, inverse: bool = False) -> Callable[..., np.ndarray | None]:
    sign = -1 if inverse and name in ("lh", "hl") else 1

    def make(model: nn.Module, s: int = 1) -> np.ndarray | None:
        return sign * haar_kernels()[name] if isinstance(model, Discriminator) and s else None

    return make


def _scaled_rules(theirs: str, ours: str, matrix: bool = False) -> list[Rule]:
    """Weights of both kinds, and the singular vectors."""
    change = linear if matrix else conv
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", change),
        Rule(f"{theirs}.weight_orig", f"{ours}/raw_kernel", change),
        Rule(f"{theirs}.weight_u", f"batch_stats/{ours}/u"),
        Rule(f"{theirs}.weight_v", f"batch_stats/{ours}/v"),
    ]


_BLOCK = "layers.{s}.blocks.{b}", "stages_{s}/layers_{b}"
_UP = "layers.{s}.upsample", "stages_{s}/upsample"
_LEVEL = "convs.{s}", "conv_{s}"

LAYOUTS = {
    "official": Rules(
        (
            *(r for i in range(16) for r in dense_rules(f"style.{i + 1}", f"mapping_{i}")),
            Rule("input.input", "constant", transpose(0, 2, 3, 1)),
            *dense_rules(f"{_BLOCK[0]}.norm1.style", f"{_BLOCK[1]}/norm1/style"),
            *dense_rules(f"{_BLOCK[0]}.norm2.style", f"{_BLOCK[1]}/norm2/style"),
            *dense_rules(f"{_BLOCK[0]}.qkv", f"{_BLOCK[1]}/qkv"),
            *dense_rules(f"{_BLOCK[0]}.proj", f"{_BLOCK[1]}/out"),
            *dense_rules(f"{_BLOCK[0]}.mlp.fc1", f"{_BLOCK[1]}/mlp/up"),
            *dense_rules(f"{_BLOCK[0]}.mlp.fc2", f"{_BLOCK[1]}/mlp/down"),
            Rule(
                f"{_BLOCK[0]}.attn.{{a}}.relative_position_bias_table",
                f"{_BLOCK[1]}/attention_{{a}}/relative_position_bias",
            ),
            Rule(f"{_UP[0]}.alpha", f"{_UP[1]}/alpha"),
            *norm_rules(f"{_UP[0]}.norm", f"{_UP[1]}/norm"),
            Rule(f"{_UP[0]}.reduction.weight", f"{_UP[1]}/reduction/kernel", linear),
            Rule(
                "to_rgbs.{s}.conv.weight", "to_rgb_{s}/conv/kernel", chain(squeeze((2, 3)), linear)
            ),
            Rule("to_rgbs.{s}.conv.bias", "to_rgb_{s}/conv/bias"),
            Rule("to_rgbs.{s}.bias", "to_rgb_{s}/bias", reshape((-1,), (1, -1, 1, 1))),
            *_scaled_rules("from_rgbs.{s}.conv.0", "from_rgb_{s}"),
            Rule("from_rgbs.{s}.conv.1.bias", "from_rgb_{s}/activation_bias"),
            *_scaled_rules(f"{_LEVEL[0]}.conv1.0", f"{_LEVEL[1]}_1"),
            Rule(f"{_LEVEL[0]}.conv1.1.bias", f"{_LEVEL[1]}_1/activation_bias"),
            *_scaled_rules(f"{_LEVEL[0]}.conv2.1", f"{_LEVEL[1]}_2"),
            Rule(f"{_LEVEL[0]}.conv2.2.bias", f"{_LEVEL[1]}_2/activation_bias"),
            *_scaled_rules("final_conv.0", "final_conv"),
            Rule("final_conv.1.bias", "final_conv/activation_bias"),
            *_scaled_rules("final_linear.0", "final_1", matrix=True),
            Rule("final_linear.0.bias", "final_1/bias"),
            Rule("final_linear.1.bias", "final_1/activation_bias"),
            *_scaled_rules("final_linear.2", "final_2", matrix=True),
            Rule("final_linear.2.bias", "final_2/bias"),
            *dense_rules("final_linear.0", "dense_1"),
            *dense_rules("final_linear.1", "dense_2"),
        ),
        derived={
            f"{_BLOCK[0]}.attn.{{a}}.relative_position_index": _index,
            f"{_BLOCK[0]}.attn_mask2": _mask,
            f"{_UP[0]}.sin_pos_embed._float_tensor": _not_last(np.zeros(1, np.float32)),
            "to_rgbs.{s}.upsample.kernel": _not_last(BLUR * 4),
            **{f"dwt.{name}": _band(name) for name in haar_kernels()},
            **{f"from_rgbs.{{s}}.dwt.{name}": _band(name) for name in haar_kernels()},
            **{f"from_rgbs.{{s}}.iwt.{name}": _band(name, True) for name in haar_kernels()},
            "from_rgbs.{s}.downsample.kernel": lambda model, s: BLUR if s else None,
            f"{_LEVEL[0]}.conv2.0.kernel": lambda model, s: BLUR,
        },
    )
}

# ------------------------------------------------------------------------------- variants

_ABOUT = {
    "paper": "StyleSwin, arXiv 2112.10762",
    "code": "github.com/microsoft/StyleSwin",
}


def _variant(size: int, multiplier: int, params: int, data: str = "", fid: float = 0) -> Variant:
    return Variant(
        module=Generator,
        fields={"size": size, "channel_multiplier": multiplier},
        task="image_generation",
        params=params,
        metric=f"FID {fid} on {data}" if fid else "",
        licence="MIT",
        files=(File(f"{data}_{size}.pt"),) if data else (),
        **_ABOUT,
    )


def _discriminator(size: int, params: int) -> Variant:
    return Variant(
        module=Discriminator,
        fields={"size": size},
        task="image_discrimination",
        params=params,
        licence="MIT",
        **_ABOUT,
    )


VARIANTS = {
    "StyleSwin_256": _variant(256, 2, 48_929_512),
    "StyleSwin_FFHQ_256": _variant(256, 2, 48_929_512, "FFHQ", 2.81),
    "StyleSwin_CelebAHQ_256": _variant(256, 2, 48_929_512, "CelebAHQ", 3.25),
    "StyleSwin_LSUNChurch_256": _variant(256, 2, 48_929_512, "LSUNChurch", 2.95),
    "StyleSwin_256_narrow": _variant(256, 1, 40_628_048),
    "StyleSwin_512": _variant(512, 1, 40_788_511),
    "StyleSwin_FFHQ_1024": _variant(1024, 1, 40_862_990, "FFHQ", 5.07),
    "StyleSwin_CelebAHQ_1024": _variant(1024, 1, 40_862_990, "CelebAHQ", 4.43),
    "StyleSwin_D_256": _discriminator(256, 26_211_585),
    "StyleSwin_D_1024": _discriminator(1024, 27_736_641),
    "styleswin_test": Variant(
        module=Generator,
        fields={"size": 16, "style_dim": 8, "mapping_layers": 2, "base_channels": 16,
                "mlp_ratio": 2.0},
        task="image_generation",
        licence="none: no published weights",
        **_ABOUT,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, depth=r"stages_(\d+)", no_decay=("constant",))
