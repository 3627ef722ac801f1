"""Stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def drop_path(
    x: Float[Array, "batch *rest"], rate: float | Array, rng: Array
) -> Float[Array, "batch *rest"]:
    """Zero whole examples with probability `rate` and scale the others by `1 / (1 - rate)`.

    Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382), per example as in timm.
    `rate` may be traced (a scanned stack has one rate a layer).
    """
    keep = jax.random.bernoulli(rng, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))


class DropPath(nn.Module):
    """`drop_path` in training, the identity otherwise. Draws from the `dropout` stream."""

    rate: float | Array = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], train: bool = False
    ) -> Float[Array, "batch *rest"]:
        if not train or (isinstance(self.rate, (int, float)) and self.rate == 0.0):
            return x
        return drop_path(x, self.rate, self.make_rng("dropout"))
