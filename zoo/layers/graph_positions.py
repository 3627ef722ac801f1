"""Positions of nodes: chances that a random walk returns, eigenvectors of the graph's Laplacian."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, batch_norm_rules, dense_rules, linear, norm_rules
from zoo.layers.attention import Attention
from zoo.layers.dense import Dense
from zoo.layers.graph import NodeBatchNorm, at_nodes, sum_at_nodes
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm

MAX_LAYERS = 8  # of an MLP of positions that official files are read with


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

    In place of the MLP there may be a linear map and a transformer, whose tokens are the
    eigenvectors. In training the signs of the eigenvectors, which nothing fixes, are drawn.

    Attributes:
      channels: of the positions.
      depth: layers of the MLP, or of the transformer.
      num_heads: of the transformer; 0: an MLP.
      norm: whether each eigenvector is normalised over the batch, with its eigenvalues.
      post_depth: layers of an MLP behind the sum.
    """

    channels: int
    depth: int = 2
    num_heads: int = 0
    norm: bool = False
    post_depth: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        eigen: Float[Array, "batch nodes wanted 2"],
        real: Bool[Array, "batch nodes"],
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """The positions; NaN is what a graph does not have."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        there = ~jnp.isnan(eigen[..., :1])
        x = jnp.where(jnp.isnan(eigen), 0, eigen)
        if train:
            signs = jax.random.rademacher(self.make_rng("dropout"), (x.shape[2],), x.dtype)
            x = x.at[..., 0].multiply(signs)
        if self.norm:
            norm = NodeBatchNorm(name="norm", **types)
            both = jnp.broadcast_to(real[..., None], (*real.shape, 2))
            x = norm(x.swapaxes(2, 3), both, train).swapaxes(2, 3)
        if self.num_heads:
            x = Dense(self.channels, name="layers_0", **types)(x)
            x = x.reshape(-1, *x.shape[2:])
            visible = there.reshape(-1, there.shape[2])
            for i in range(self.depth):
                x = PostNormBlock(self.num_heads, name=f"blocks_{i}", **types)(x, visible, train)
            x = x.reshape(*there.shape[:3], -1)
        else:
            x = self._mlp(x, self.depth, "layers")
        return self._mlp(jnp.where(there, x, 0).sum(2), self.post_depth, "post")

    def _mlp(self, x: Array, depth: int, name: str) -> Array:
        """Twice as wide inside, and a ReLU behind the last layer, too."""
        for i in range(depth):
            width = self.channels * (1 if i == depth - 1 else 2)
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            x = nn.relu(Dense(width, name=f"{name}_{i}", **types)(x))
        return x


class PostNormBlock(nn.Module):
    """The layer of a transformer as PyTorch builds it by default: norms behind sums, 2048 wide."""

    num_heads: int
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch length"],
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """The tokens after the layer."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        attention = Attention(
            self.num_heads, attention_dropout=self.dropout, name="attention", **types
        )
        x = norm(name="norm1")(x + drop(attention(x, visible, train)))
        mlp = Mlp(2048, nn.relu, self.dropout, name="mlp", **types)
        return norm(name="norm2")(x + mlp(x, train))


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


def eigen_rules(theirs: str, ours: str) -> list[Rule]:
    """Of `EigenPositions` in the names of GraphGPS, where they are LapPE."""
    block, place = f"{theirs}.pe_encoder.layers.{{i}}", f"{ours}/blocks_{{i}}"
    names = ["linear_A", *(f"pe_encoder.{2 * i + 1}" for i in range(MAX_LAYERS))]
    return [
        *batch_norm_rules(f"{theirs}.raw_norm", f"{ours}/norm"),
        *(
            rule
            for i, name in enumerate(names)
            for rule in dense_rules(f"{theirs}.{name}", f"{ours}/layers_{i}")
        ),
        Rule(f"{block}.self_attn.in_proj_weight", f"{place}/attention/qkv/kernel", linear),
        Rule(f"{block}.self_attn.in_proj_bias", f"{place}/attention/qkv/bias"),
        *dense_rules(f"{block}.self_attn.out_proj", f"{place}/attention/out"),
        *dense_rules(f"{block}.linear1", f"{place}/mlp/up"),
        *dense_rules(f"{block}.linear2", f"{place}/mlp/down"),
        *norm_rules(f"{block}.norm1", f"{place}/norm1"),
        *norm_rules(f"{block}.norm2", f"{place}/norm2"),
        *(
            rule
            for i in range(MAX_LAYERS)
            for rule in dense_rules(f"{theirs}.post_mlp.{2 * i}", f"{ours}/post_{i}")
        ),
    ]


def sign_rules(theirs: str, ours: str) -> list[Rule]:
    """Of `SignPositions` in the names of GraphGPS."""
    net = f"{theirs}.sign_inv_net"
    rules = batch_norm_rules(f"{net}.enc.bns.{{i}}", f"{ours}/norms_{{i}}")
    for a, b in (("enc.layers.{i}.nn", "layers_{i}"), ("rho", "post")):
        rules += dense_rules(f"{net}.{a}.lins.{{k}}", f"{ours}/{b}/layers_{{k}}")
        rules += batch_norm_rules(f"{net}.{a}.bns.{{k}}", f"{ours}/{b}/norm_{{k}}")
    return rules


def sign_derived(theirs: str) -> dict[str, Callable[..., np.ndarray | None]]:
    """Tensors of `SignPositions` that follow from the model's `sign_layers`, `sign_post_layers`."""

    def epsilon(model: nn.Module, i: int) -> np.ndarray | None:  # of the GIN, fixed at 0
        return np.zeros(1, np.float32) if i < model.sign_layers else None

    def counter(less: int, model: nn.Module, i: int) -> np.ndarray | None:
        return np.zeros((), np.int64) if i < model.sign_layers - less else None

    def post_counter(model: nn.Module, i: int) -> np.ndarray | None:
        there = model.sign_layers and i < model.sign_post_layers - 1
        return np.zeros((), np.int64) if there else None

    net, tracked = f"{theirs}.sign_inv_net", "num_batches_tracked"
    return {
        f"{net}.enc.layers.{{i}}.eps": epsilon,
        f"{net}.enc.layers.{{i}}.nn.bns.0.{tracked}": partial(counter, 0),
        f"{net}.enc.bns.{{i}}.{tracked}": partial(counter, 1),
        f"{net}.rho.bns.{{i}}.{tracked}": post_counter,
    }
