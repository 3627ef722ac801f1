"""The plain block of vision transformers."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers.attention import Attention
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stochastic import DropPath

init = nn.initializers.normal(0.02)  # timm's truncation, at 100 deviations, never acts


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm, an optional scale and a residual connection.

    Attributes:
      out_bias: biases of `attention/out` and of the MLP.
      layer_scale: initial value of a learned scale per channel on both branches; None: no scales.
      scale: factor on q k^T; None is 1 / sqrt(head width).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    out_bias: bool = True
    query_key_norm: bool = False
    layer_scale: float | None = None
    scale: float | None = None
    epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        drop_path: float | Array = 0.0,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """`drop_path` is this block's rate: an argument, so that a scanned stack can vary it."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        channels = x.shape[-1]
        attention = Attention(
            self.num_heads,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            query_key_norm=self.query_key_norm,
            scale=self.scale,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            epsilon=self.epsilon,
            kernel_init=init,
            name="attention",
            **types,
        )
        mlp = Mlp(
            int(channels * self.mlp_ratio),
            dropout=self.dropout,
            use_bias=self.out_bias,
            kernel_init=init,
            name="mlp",
            **types,
        )
        y = attention(norm(name="norm1")(x), train=train)
        x = x + DropPath(drop_path)(self._scaled(y, "layer_scale1"), train)
        y = mlp(norm(name="norm2")(x), train)
        x = x + DropPath(drop_path)(self._scaled(y, "layer_scale2"), train)
        return constrain(x, "batch", "length", "channels")

    def _scaled(self, y: Array, name: str) -> Array:
        if self.layer_scale is None:
            return y
        start = nn.initializers.constant(self.layer_scale)
        return y * self.param(name, start, y.shape[-1:], self.param_dtype).astype(self.dtype)
