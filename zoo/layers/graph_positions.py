"""Positions of nodes: chances that a random walk returns, eigenvectors of the graph's Laplacian."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.layers.dense import Dense


def return_chances(
    edges: Int[np.ndarray, "2 edges"], count: int, steps: int
) -> Float[np.ndarray, "nodes steps"]:
    """The chance that a random walk is back at its start after 1, 2, ... steps."""
    adjacency = np.zeros((count, count))
    np.add.at(adjacency, (edges[0], edges[1]), 1.0)
    degree = adjacency.sum(1, keepdims=True)
    walk = np.divide(adjacency, degree, out=np.zeros_like(adjacency), where=degree > 0)
    power, chances = np.eye(count), np.zeros((count, steps), np.float32)
    for step in range(steps):
        power = power @ walk
        chances[:, step] = np.diag(power)
    return chances


def laplacian_eigenvectors(
    edges: Int[np.ndarray, "2 edges"], count: int, wanted: int, normalised: bool = False
) -> Float[np.ndarray, "nodes wanted 2"]:
    """What each node has in the eigenvectors of the graph's Laplacian, and their eigenvalues.

    Args:
      edges: source and target of each edge, both ways.
      count: of nodes.
      wanted: so many of the smallest eigenvalues; those that a small graph lacks are NaN.
      normalised: 1 - A_ij / sqrt(deg_i deg_j) in place of deg - A.
    """
    adjacency = np.zeros((count, count))
    adjacency[edges[0], edges[1]] = 1.0
    degree = adjacency.sum(1)
    laplacian = np.diag(degree) - adjacency
    if normalised:
        root = np.where(degree > 0, degree, 1) ** -0.5
        laplacian = root[:, None] * laplacian * root
    values, vectors = np.linalg.eigh(laplacian)
    found = np.full((count, wanted, 2), np.nan, np.float32)
    some = min(count, wanted)
    found[:, :some, 0], found[:, :some, 1] = vectors[:, :some], np.maximum(values[:some], 0)
    return found


class EigenPositions(nn.Module):
    """A sum over eigenvectors: an MLP of what the node has in one, and of its eigenvalue.

    In training the signs of the eigenvectors, which nothing fixes, are drawn.

    Attributes:
      channels: of the positions.
      depth: layers of the MLP.
    """

    channels: int
    depth: int = 2
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, eigen: Float[Array, "batch nodes wanted 2"], train: bool = False
    ) -> Float[Array, "batch nodes channels"]:
        """The positions; NaN is what a graph does not have."""
        there = ~jnp.isnan(eigen[..., :1])
        x = jnp.where(jnp.isnan(eigen), 0, eigen)
        if train:
            signs = jax.random.rademacher(self.make_rng("dropout"), (x.shape[2],), x.dtype)
            x = x.at[..., 0].multiply(signs)
        for i in range(self.depth):
            width = self.channels * (1 if i == self.depth - 1 else 2)
            layer = Dense(width, name=f"layers_{i}", dtype=self.dtype, param_dtype=self.param_dtype)
            x = nn.relu(layer(x))
        return jnp.where(there, x, 0).sum(2)
