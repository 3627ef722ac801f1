"""Normalisation."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, Float


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, which JAX traces once for all layers of one shape.

    The variance takes two passes: E[x^2] - E[x]^2 loses digits where |mean| is far above the
    deviation.
    """

    use_fast_variance: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        width, affine = x.shape[-1:], {}
        if self.use_scale:
            affine["scale"] = self.param("scale", self.scale_init, width, self.param_dtype)
        if self.use_bias:
            affine["bias"] = self.param("bias", self.bias_init, width, self.param_dtype)
        statistics = jnp.promote_types(self.dtype or x.dtype, jnp.float32)
        dtype = canonicalize_dtype(x, *affine.values(), dtype=self.dtype)
        return _normalise(x, **affine, epsilon=self.epsilon, statistics=statistics, dtype=dtype)


@partial(jax.jit, static_argnames=("epsilon", "statistics", "dtype"))
def _normalise(x, scale=None, bias=None, *, epsilon, statistics, dtype):
    wide = x.astype(statistics)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    # not of the factor, which a gradient would spread over the channels to sum it again
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(dtype)
