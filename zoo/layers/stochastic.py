"""Stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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


def drop_path_rates(last: float, depths: tuple[int, ...]) -> list[tuple[float, ...]]:
    """Rates of the blocks of each stage: they grow linearly, from 0 at the first to `last`."""
    rates = np.linspace(0.0, last, sum(depths)).tolist()
    ends = np.cumsum(depths).tolist()
    return [tuple(rates[end - depth : end]) for depth, end in zip(depths, ends, strict=True)]


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
