"""Pyramids: blocks at one resolution, then a step that halves the map and doubles the channels."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from zoo.layers.dense import Dense
from zoo.layers.norm import LayerNorm
from zoo.layers.patch import torch_default_init
from zoo.layers.window import pad_to_multiple


class Stage(nn.Module):
    """Blocks at one resolution, and the step to the next.

    Attributes:
      blocks: makers of the blocks `layers_0 ...`; a block is called with the map and `train`.
      downsample: maker of `downsample`, or None in the last stage.
    """

    blocks: tuple[Callable[..., nn.Module], ...]
    downsample: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> tuple[Float[Array, "batch height width channels"], Array | None]:
        """The map after the blocks, and the merged one (None in the last stage)."""
        for i, block in enumerate(self.blocks):
            x = block(name=f"layers_{i}")(x, train)
        return x, None if self.downsample is None else self.downsample(name="downsample")(x)


class PatchMerging(nn.Module):
    """Halve the map: 2x2 neighbours concatenated (down before right), LayerNorm, 4C -> 2C.

    Attributes:
      pad: complete an odd map with a row or column of zeros, instead of refusing it.
    """

    pad: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height/2 width/2 2*channels"]:
        batch = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])  # frames of a clip as maps of their own
        x = pad_to_multiple(x, 2, 2) if self.pad else x
        _, height, width, channels = x.shape
        if height % 2 or width % 2:
            raise ValueError(
                f"Patch merging needs an even map, not {height}x{width}; "
                "choose an image size divisible by patch_size * 2 ** (stages - 1)."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = rearrange(x, "b (h m) (w n) c -> b h w (n m c)", m=2, n=2)
        x = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        init = nn.initializers.normal(0.02)
        dense = Dense(2 * channels, use_bias=False, kernel_init=init, name="reduction", **types)
        return dense(x).reshape(*batch, *x.shape[1:3], -1)


class ConvMerging(nn.Module):
    """Halve the map, rounding up: a 3x3 convolution of stride 2, then LayerNorm."""

    channels: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch (height+1)//2 (width+1)//2 channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Conv(
            self.channels,
            (3, 3),
            strides=2,
            padding=1,
            use_bias=self.use_bias,
            kernel_init=torch_default_init,
            name="conv",
            **types,
        )(x)
        return LayerNorm(epsilon=1e-5, name="norm", **types)(x)
