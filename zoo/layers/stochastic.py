"""Stochastic depth.

A network drops dozens of paths, a few numbers each. Drawn with JAX's generator, each would be two
loops of their own in the compiled step, a third of a second each to compile. They are hashes
instead: of the step's key, the module's path and the number of the row, all of 32 bits.
"""

import hashlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng
from jaxtyping import Array, Float, UInt32

from zoo.layers.materialize import materialized


def drop_path(
    x: Float[Array, "batch *rest"], rate: float | Array, draw: Float[Array, "batch"]
) -> Float[Array, "batch *rest"]:
    """Zero the examples whose `draw` is below `rate`, scale the others by `1 / (1 - rate)`.

    Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382), per example as in timm.
    `rate` may be traced (a scanned stack has one rate a layer).
    """
    keep = (draw >= rate).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))


def mixed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Each number to another one, every bit of which depends on every bit.

    The multipliers are those that Chris Wellons found (github.com/skeeto/hash-prospector, public
    domain) to have the least bias.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def uniform_rows(key: Array, name: str, count: int) -> Float[Array, "count"]:
    """A number from [0, 1) for each row, of a key and a name.

    Rows of a batch have the same numbers however the batch is cut over devices.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return _uniform_rows(key, *np.frombuffer(digest, "<u4", count=2), count)


@partial(jax.jit, static_argnums=3)  # traced once for all paths
def _uniform_rows(key: Array, low: Array, high: Array, count: int) -> Array:
    words = jax.random.key_data(key)
    rows = jax.lax.iota(jnp.uint32, count) * np.uint32(0x9E3779B9)
    bits = mixed(mixed(rows + (words[0] ^ low)) + (words[-1] ^ high))
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


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
        return drop_path(x, self.rate, self._draw(x.shape[0]))

    def _draw(self, count: int) -> Float[Array, "count"]:
        if not self.has_rng("dropout"):
            self.make_rng("dropout")  # says what is missing
        # make_rng would fold the path into the key: a loop in the compiled step
        stream = LazyRng.create(self.scope.rngs["dropout"], self.scope.rng_counters["dropout"])
        self.scope.rng_counters["dropout"] += 1
        name = "/".join(map(str, stream.suffix))
        return materialized(uniform_rows(stream.rng, name, count))
