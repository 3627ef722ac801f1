"""Messages along the edges of graphs that are padded to one size.

A batch of graphs is `nodes [batch, nodes, ...]`, of which the first `num_nodes[b]` are real, and
`edges [batch, edges, 2]` of source and target; an edge that is padding has a target past the last
node, to which its message is lost.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ATOM_NUMBERS = (119, 5, 12, 12, 10, 6, 6, 2, 2)
"""Values of the nine features of an atom in OGB: number, chirality, degree, charge, ..."""
BOND_NUMBERS = (5, 6, 2)
"""Values of the three features of a bond in OGB: type, stereo, conjugated."""


def real_nodes(num_nodes: Int[Array, "batch"], size: int) -> Bool[Array, "batch nodes"]:
    """Which rows of nodes are not padding."""
    return jnp.arange(size) < num_nodes[:, None]


def at_nodes(
    x: Float[Array, "batch nodes channels"], index: Int[Array, "batch edges"]
) -> Float[Array, "batch edges channels"]:
    """The rows of these nodes; of a node that is not there, the last."""
    return jnp.take_along_axis(x, index[..., None], 1, mode="clip")


def sum_at_nodes(
    messages: Float[Array, "batch edges channels"], target: Int[Array, "batch edges"], size: int
) -> Float[Array, "batch nodes channels"]:
    """The sum of the messages that each node gets."""
    return jax.vmap(lambda m, t: jax.ops.segment_sum(m, t, size))(messages, target)


class SumOfEmbeddings(nn.Module):
    """The sum of a row of each table, one a feature: OGB's encoders of atoms and bonds.

    Attributes:
      sizes: rows of each table.
      channels: width.
    """

    sizes: tuple[int, ...]
    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Int[Array, "*rows features"]) -> Float[Array, "*rows channels"]:
        """The sum."""
        init = nn.initializers.xavier_uniform()
        x = 0.0
        for i, size in enumerate(self.sizes):
            shape = (size, self.channels)
            table = self.param(f"table{i}_embedding", init, shape, self.param_dtype)
            x = x + table.astype(self.dtype)[features[..., i]]
        return x


class NodeBatchNorm(nn.Module):
    """Batch normalisation over the real nodes (or edges, or graphs) of a batch.

    Padding is left out of the statistics, and zero afterwards.
    """

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*rows channels"],
        real: Bool[Array, "*rows"] | None = None,
        train: bool = False,
    ) -> Float[Array, "*rows channels"]:
        """The normalised rows."""
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="norm",
        )
        nn.share_scope(self, norm)
        if real is None:
            return norm(x)
        return jnp.where(real[..., None], norm(x, mask=real[..., None]), 0)


class GraphLayerNorm(nn.Module):
    """Layer norm over all real nodes and channels of a graph, with a scale for each channel."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        real: Bool[Array, "batch nodes"],
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """The normalised nodes, and zeros at padding."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        real, wide = real[..., None], x.astype(jnp.float32)
        count = jnp.maximum(real.sum((1, 2), keepdims=True) * x.shape[-1], 1)
        wide = wide - jnp.where(real, wide, 0).sum((1, 2), keepdims=True) / count
        squares = jnp.where(real, wide * wide, 0).sum((1, 2), keepdims=True) / count
        y = wide * jax.lax.rsqrt(squares + 1e-5) * scale + bias
        return jnp.where(real, y, 0).astype(self.dtype)


class NoNorm(nn.Module):
    """In place of a norm, which gives zeros at padding, too."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, real: Array, train: bool = False) -> Array:
        """The nodes as they are."""
        return jnp.where(real[..., None], x, 0)
