"""Cutting images into tokens."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from zoo.layers.dense import dot_general

torch_default_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class PatchEmbed(nn.Module):
    """A linear map of each `patch_size` x `patch_size` patch: a convolution with stride = kernel.

    Written as one matrix product over flattened patches, with the convolution's parameters
    `kernel [patch, patch, in_channels, channels]` and `bias [channels]`.

    Raises:
      ValueError: if the image is not a whole number of patches.
    """

    channels: int
    patch_size: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        p = self.patch_size
        _, height, width, in_channels = images.shape
        if height % p or width % p:
            raise ValueError(
                f"An image of {height}x{width} is not a whole number of {p}x{p} patches; "
                f"resize or pad it to multiples of {p}."
            )
        kernel = self.param(
            "kernel", torch_default_init, (p, p, in_channels, self.channels), self.param_dtype
        )
        patches = rearrange(images.astype(self.dtype), "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        kernel = kernel.astype(self.dtype).reshape(-1, self.channels)
        tokens = dot_general(patches, kernel, (((3,), (0,)), ((), ())))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), self.param_dtype)
            tokens = tokens + bias.astype(self.dtype)
        return tokens
