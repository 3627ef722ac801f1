"""Positions of nodes: chances that a random walk returns, eigenvectors of the graph's Laplacian."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.layers.dense import Dense
from zoo.layers.graph import NodeBatchNorm, at_nodes, sum_at_nodes


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


class NormedMlp(nn.Module):
    """Linear maps with a ReLU and then a norm over the real nodes between them.

    Attributes:
      widths: channels behind each map.
    """

    widths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*rows channels"],
        real: Bool[Array, "*rows"],
        train: bool = False,
    ) -> Float[Array, "*rows out"]:
        """The rows; those that are not real mean nothing."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i, width in enumerate(self.widths):
            x = Dense(width, name=f"layers_{i}", **types)(x)
            if i + 1 < len(self.widths):
                x = NodeBatchNorm(name=f"norm_{i}", **types)(nn.relu(x), real, train)
        return x


class SignPositions(nn.Module):
    """SignNet: a graph network reads each eigenvector and its negative, and both are summed.

    Lim et al., "Sign and Basis Invariant Networks for Spectral Graph Representation Learning", ICLR
    2023, arXiv 2202.13013, as github.com/rampasek/GraphGPS (MIT) has it: the network is a GIN.

    Attributes:
      channels: of the positions.
      depth: layers of the GIN, at least 2.
      width: channels inside it and inside the MLP behind it.
      out: channels that it gives for each eigenvector.
      post_depth: layers of the MLP.
      summed: the MLP reads the sum over the eigenvectors that a graph has; else all side by side.
    """

    channels: int
    depth: int = 8
    width: int = 64
    out: int = 64
    post_depth: int = 3
    summed: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        vectors: Float[Array, "batch nodes wanted"],
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"],
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """The positions; NaN is what a graph does not have."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, size, wanted = vectors.shape
        every = jnp.broadcast_to(real[..., None], vectors.shape)
        layers = [
            NormedMlp((self.width, width), name=f"layers_{i}", **types)
            for i, width in enumerate((*(self.width,) * (self.depth - 1), self.out))
        ]
        norms = [NodeBatchNorm(name=f"norms_{i}", **types) for i in range(self.depth - 1)]

        def read(x: Float[Array, "batch nodes wanted 1"]) -> Float[Array, "batch nodes wanted out"]:
            for i, layer in enumerate(layers):
                x = norms[i - 1](x, every, train) if i else x
                flat = x.reshape(batch, size, -1)
                sums = sum_at_nodes(at_nodes(flat, source), target, size).reshape(x.shape)
                x = layer(x + sums, every, train)
            return x

        x = jnp.where(jnp.isnan(vectors) | ~every, 0, vectors)[..., None].astype(self.dtype)
        x = read(x) + read(-x)
        if self.summed:
            there = jnp.arange(wanted) < real.sum(1)[:, None]  # a graph of n nodes has n of them
            x = jnp.where(there[:, None, :, None], x, 0).sum(2)
        else:
            x = x.reshape(batch, size, -1)
        widths = (*(self.width,) * (self.post_depth - 1), self.channels)
        return NormedMlp(widths, name="post", **types)(x, real, train)
