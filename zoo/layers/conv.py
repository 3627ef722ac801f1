"""Convolutions of maps."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers.mlp import gelu
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init


class DepthwiseConv(nn.Module):
    """Convolution of each channel alone over `size` x `size` positions, zeros outside the map.

    The parameters are those of `nn.Conv` with one group a channel: `kernel [size, size, 1,
    channels]` and `bias [channels]`. Written as a sum of shifted products, which compilers fuse:
    on a CPU, where XLA has no fast grouped convolution, it is 20 to 50 times as fast as one.

    Attributes:
      size: odd.
      stride: take every stride-th row and column of the result.
    """

    size: int = 3
    stride: int = 1
    use_bias: bool = True
    kernel_init: Callable = torch_default_init
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        _, height, width, channels = x.shape
        shape = (self.size, self.size, 1, channels)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        kernel = kernel.astype(jnp.float32)
        edge = (self.size // 2, self.size // 2)
        padded = jnp.pad(x, ((0, 0), edge, edge, (0, 0))).astype(jnp.float32)
        y = sum(
            kernel[i, j, 0] * padded[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(self.size)
            for j in range(self.size)
        )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        return y.astype(self.dtype)


class ConvMlp(nn.Module):
    """`down(gelu(conv(up(x))))`, the convolution 3x3 and of each channel alone (PVT v2).

    Attributes:
      hidden: width of the middle, in channels.
      dropout: rate after the activation and at the end.
      kernel_init: initialiser of both matrices.
      conv_init: initialiser of the convolution.
    """

    hidden: int
    dropout: float = 0.0
    kernel_init: Callable = nn.initializers.normal(0.02)
    conv_init: Callable = torch_default_init
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(nn.Dense, kernel_init=self.kernel_init, **types)
        y = dense(self.hidden, name="up")(x)
        y = gelu(DepthwiseConv(kernel_init=self.conv_init, name="conv", **types)(y))
        y = constrain(y, "batch", "height", "width", "mlp")
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = dense(x.shape[-1], name="down")(y)
        return nn.Dropout(self.dropout)(y, deterministic=not train)
