"""The residual block of transformers: mixing positions, then an MLP, each behind a LayerNorm."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers.attention import Attention
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stochastic import DropPath

init = nn.initializers.normal(0.02)  # timm's truncation, at 100 deviations, never acts

POSITIONS = {1: ("length",), 2: ("height", "width"), 3: ("time", "height", "width")}
"""Number of axes between batch and channels -> their names for `constrain`."""


class ResidualBlock(nn.Module):
    """`x + DropPath(g1 * mixer(LN(x)))`, then the same with an MLP; the scales g are optional.

    Attributes:
      mixer: makes what mixes positions; both makers name their module, `partial(..., name=...)`,
        and it is called with the normed input and `train`.
      mlp: makes what follows.
      layer_scale: initial value of a learned scale per channel on both branches; None: no scales.
      epsilon: of both norms.
      drop_path: rate of both branches.
    """

    mixer: Callable[[], nn.Module]
    mlp: Callable[[], nn.Module]
    layer_scale: float | None = None
    epsilon: float = 1e-5
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *positions channels"], train: bool = False
    ) -> Float[Array, "batch *positions channels"]:
        return residual(self, x, self.mixer(), self.mlp(), self.drop_path, train)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm, an optional scale and a residual connection.

    Attributes:
      out_bias: biases of `attention/out` and of the MLP.
      activation: of the MLP; the default is the exact (erf) GELU.
      layer_scale: initial value of a learned scale per channel on both branches; None: no scales.
      scale: factor on q k^T; None is 1 / sqrt(head width).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    out_bias: bool = True
    query_key_norm: bool = False
    activation: Callable[[Array], Array] = gelu
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
            int(x.shape[-1] * self.mlp_ratio),
            self.activation,
            dropout=self.dropout,
            use_bias=self.out_bias,
            kernel_init=init,
            name="mlp",
            **types,
        )
        return residual(self, x, partial(_call, attention), mlp, drop_path, train)


def _call(attention: Attention, x: Array, train: bool) -> Array:
    return attention(x, train=train)


def residual(
    block: nn.Module,
    x: Float[Array, "batch *positions channels"],
    mixer: Callable[[Array, bool], Array],
    mlp: Callable[[Array, bool], Array],
    drop_path: float | Array,
    train: bool,
) -> Float[Array, "batch *positions channels"]:
    """Both branches of a block; for its compact method.

    Args:
      block: gives `layer_scale`, `epsilon` and both number types; owns `norm1`, `norm2` and the
        scales.
      x: its input.
      mixer: from the normed input and `train` to the first branch.
      mlp: the same of the second.
      drop_path: rate of both branches.
      train: whether paths are dropped.
    """
    types = {"dtype": block.dtype, "param_dtype": block.param_dtype}
    for i, branch in enumerate((mixer, mlp), 1):
        norm = LayerNorm(epsilon=block.epsilon, name=f"norm{i}", **types)
        y = branch(norm(x), train)
        if block.layer_scale is not None:
            start = nn.initializers.constant(block.layer_scale)
            scale = block.param(f"layer_scale{i}", start, y.shape[-1:], block.param_dtype)
            y = y * scale.astype(block.dtype)
        x = x + DropPath(drop_path)(y, train)
        x = constrain(x, "batch", *POSITIONS[x.ndim - 2], "channels")
    return x
