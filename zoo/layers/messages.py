"""What nodes of a graph make of messages along its edges: the layers that GraphGPS chooses from.

Names and numbers are those of PyTorch Geometric (MIT), which the official GraphGPS uses. x_i is a
node, e_ij the features of the edge from j to i, and sums are over the edges into i.

    isotropic    MLP(x_i + sum_j relu(x_j + e_ij))             GINE; GIN without edges and relu
    convolved    sum_j W x_j / sqrt(deg_i deg_j)               GCN; i is its own neighbour, too
    gated        A x_i + sum_j s B x_j / sum_j s               s from x_i, x_j and e_ij
    attentive    sum_j a_ij W x_j                              GAT; a: softmax of a score, i too
    softmax      MLP(x_i + sum_j a_ij m_ij)                    GENConv; a: softmax of m, a channel
    principal    W [x_i | mean | max | sum of W' [x_i | x_j | e_ij]]    PNA

All are called with the nodes, the edges' features, the source and target of each edge, which nodes
are real, and whether to train; those of the last two that a layer does not need, it does not read.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, dense_rules, linear, squeeze
from zoo.layers.dense import Dense
from zoo.layers.graph import NodeBatchNorm, at_nodes, sum_at_nodes
from zoo.layers.mlp import ACTIVATIONS, Mlp


class DistanceGate(nn.Module):
    """A factor on the message of an edge, from how far apart the positions of its ends are.

        sigmoid(W2 act(W1 |p_i - p_j|^2))

    Wang et al., "Equivariant and Stable Positional Encoding for More Powerful Graph Neural
    Networks", ICLR 2022, arXiv 2203.00199.

    Attributes:
      channels: between the two maps.
      activation: between them.
    """

    channels: int
    activation: str = "relu"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        place: Float[Array, "batch nodes width"],
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
    ) -> Float[Array, "batch edges 1"]:
        """The factors."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        far = jnp.square(at_nodes(place, target) - at_nodes(place, source)).sum(-1, keepdims=True)
        x = ACTIVATIONS[self.activation](Dense(self.channels, name="up", **types)(far))
        return nn.sigmoid(Dense(1, name="down", **types)(x))


class IsotropicMessages(nn.Module):
    """GINE, or GIN without edges: an MLP of a node and the sum of its neighbours."""

    use_edges: bool = True
    activation: str = "relu"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        edge: Float[Array, "batch edges channels"],
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """What each node makes of its messages."""
        messages = at_nodes(x, source)
        messages = nn.relu(messages + edge) if self.use_edges else messages
        y = x + sum_at_nodes(messages, target, x.shape[1])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Mlp(x.shape[-1], ACTIVATIONS[self.activation], name="mlp", **types)(y)


class ConvolvedMessages(nn.Module):
    """GCN: the sum of a node and its neighbours, each over the roots of both degrees.

    A node counts as a neighbour of its own, in its degree, too.
    """

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        edge: Float[Array, "batch edges channels"] | None,
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """What each node makes of its messages."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        x = Dense(x.shape[-1], use_bias=False, name="map", **types)(x)
        ones = jnp.ones((*source.shape, 1), x.dtype)
        root = jax.lax.rsqrt(1 + sum_at_nodes(ones, target, x.shape[1]))
        y = root * x + sum_at_nodes(at_nodes(root * x, source), target, x.shape[1])
        return root * y + bias.astype(y.dtype)


class GatedMessages(nn.Module):
    """Gated GCN: edges are features that gate what a node gets, and are renewed.

        e' = D x_i + E x_j + C e_ij;   s = sigmoid(e')
        x' = A x_i + sum_j s B x_j / (sum_j s + 1e-6)
        x = x + relu(BN(x'));   e = e + relu(BN(e'))

    With the `place` of each node s is multiplied by a `DistanceGate`.

    Attributes:
      dropout: rate behind both.
      residual: whether x and e are added.
      activation: in place of the ReLU.
    """

    dropout: float = 0.0
    residual: bool = True
    activation: str = "relu"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        edge: Float[Array, "batch edges channels"],
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"],
        train: bool = False,
        place: Float[Array, "batch nodes width"] | None = None,
    ) -> tuple[Float[Array, "batch nodes channels"], Float[Array, "batch edges channels"]]:
        """The nodes and the edges, renewed."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        a, b, c, d, e = (Dense(x.shape[-1], name=name, **types) for name in "ABCDE")
        gate = at_nodes(d(x), target) + at_nodes(e(x), source) + c(edge)
        share = nn.sigmoid(gate)
        if place is not None:
            distance_gate = DistanceGate(x.shape[-1], self.activation, name="gate", **types)
            share = share * distance_gate(place, source, target)
        total = partial(sum_at_nodes, target=target, size=x.shape[1])
        y = a(x) + total(share * at_nodes(b(x), source)) / (total(share) + 1e-6)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        act = ACTIVATIONS[self.activation]
        y = drop(act(NodeBatchNorm(name="norm_node", **types)(y, real, train)))
        there = target < x.shape[1]
        gate = drop(act(NodeBatchNorm(name="norm_edge", **types)(gate, there, train)))
        return (x + y, edge + gate) if self.residual else (y, gate)


class AttentiveMessages(nn.Module):
    """GAT: a softmax over the neighbours of a node and itself says what each one counts.

    The edge from a node to itself has the mean of the features of the edges into the node; edges of
    that kind which the graph has are left out.

    Attributes:
      num_heads: of scores; must divide the channels.
    """

    num_heads: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        edge: Float[Array, "batch edges channels"],
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """What each node makes of its messages."""
        size, channels = x.shape[1:]
        heads = (self.num_heads, channels // self.num_heads)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        target = jnp.where(source == target, size, target)
        there = (target < size)[..., None]

        def scores(values: Array, name: str) -> Float[Array, "batch rows heads"]:
            init = nn.initializers.glorot_uniform()
            row = self.param(f"{name}_score", init, heads, self.param_dtype).astype(self.dtype)
            return jnp.einsum("brnd,nd->brn", values.reshape(*values.shape[:2], *heads), row)

        total = partial(sum_at_nodes, target=target, size=size)
        x = Dense(channels, use_bias=False, name="map", **types)(x)
        own = total(jnp.where(there, edge, 0)) / jnp.maximum(total(there.astype(x.dtype)), 1)
        map_edge = Dense(channels, use_bias=False, name="map_edge", **types)
        of_source, of_target = scores(x, "source"), scores(x, "target")
        both = scores(map_edge(jnp.concatenate([edge, own], 1)), "edge")
        score, own_score = jnp.split(both, [edge.shape[1]], 1)
        score = at_nodes(of_source, source) + at_nodes(of_target, target) + score
        score = nn.leaky_relu(score, 0.2)
        own_score = nn.leaky_relu(of_source + of_target + own_score, 0.2)
        top = jax.lax.stop_gradient(jnp.maximum(own_score, max_at_nodes(score, target, size)))
        weight = exponentials(score, top, target)
        own_weight = jnp.exp(own_score - top)
        share = 1 / (total(weight) + own_weight)
        wide = partial(jnp.repeat, repeats=heads[1], axis=-1)
        y = total(wide(weight * at_nodes(share, target)) * at_nodes(x, source))
        y = y + wide(own_weight * share) * x
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        return y + bias.astype(y.dtype)


class SoftmaxMessages(nn.Module):
    """GENConv: in each channel a softmax of the messages says what each of them counts."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        edge: Float[Array, "batch edges channels"],
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"],
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """What each node makes of its messages."""
        size, channels = x.shape[1:]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        message = nn.relu(at_nodes(x, source) + edge) + 1e-7
        top = jax.lax.stop_gradient(max_at_nodes(message, target, size))
        weight = exponentials(message, top, target)
        total = partial(sum_at_nodes, target=target, size=size)
        y = x + total(weight * message) / jnp.maximum(total(weight), 1e-16)
        y = Dense(2 * channels, use_bias=False, name="expand", **types)(y)
        y = nn.relu(NodeBatchNorm(name="norm", **types)(y, real, train))
        return Dense(channels, use_bias=False, name="reduce", **types)(y)


class PrincipalMessages(nn.Module):
    """PNA with one tower and no scalers: mean, maximum and sum of messages, side by side."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        edge: Float[Array, "batch edges edge_channels"],
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """What each node makes of its messages; the maximum of none is 0."""
        size, channels = x.shape[1:]
        dense = partial(Dense, channels, dtype=self.dtype, param_dtype=self.param_dtype)
        parts = [at_nodes(x, target), at_nodes(x, source), dense(name="embed_edge")(edge)]
        message = dense(name="message")(jnp.concatenate(parts, -1))
        total = partial(sum_at_nodes, target=target, size=size)
        there = (target < size).astype(x.dtype)[..., None]
        count, added = total(there), total(message * there)
        largest = jnp.where(count > 0, max_at_nodes(message, target, size), 0)
        y = jnp.concatenate([x, added / jnp.maximum(count, 1), largest, added], -1)
        return dense(name="out")(dense(name="update")(y))


def exponentials(
    score: Float[Array, "batch edges channels"],
    top: Float[Array, "batch nodes channels"],
    target: Int[Array, "batch edges"],
) -> Float[Array, "batch edges channels"]:
    """`exp(score - top of the edge's target)`, and 0 for padding: a softmax before its division."""
    there = (target < top.shape[1])[..., None]
    below = jnp.where(there, score - at_nodes(top, target), 0)  # no infinity at padding
    return jnp.where(there, jnp.exp(below), 0)


def max_at_nodes(
    messages: Float[Array, "batch edges channels"], target: Int[Array, "batch edges"], size: int
) -> Float[Array, "batch nodes channels"]:
    """The largest message that each node gets, or the lowest number where it gets none."""
    lowest = jnp.finfo(messages.dtype).min
    found = jax.vmap(lambda m, t: jax.ops.segment_max(m, t, size))(messages, target)
    return jnp.maximum(found, lowest)


def message_rules(theirs: str, ours: str) -> list[Rule]:
    """Of all these layers in the names of PyTorch Geometric and GraphGPS."""
    return [
        Rule(f"{theirs}.lin.weight", f"{ours}/map/kernel", linear),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
        *(
            Rule(f"{theirs}.att_{short}", f"{ours}/{name}_score", squeeze(0))
            for short, name in (("src", "source"), ("dst", "target"), ("edge", "edge"))
        ),
        Rule(f"{theirs}.lin_edge.weight", f"{ours}/map_edge/kernel", linear),
        *(
            rule
            for name, place in (
                ("mlp.0", "expand"),
                ("mlp.4", "reduce"),
                ("edge_encoder", "embed_edge"),
                ("pre_nns.0.0", "message"),
                ("post_nns.0.0", "update"),
                ("lin", "out"),
            )
            for rule in dense_rules(f"{theirs}.{name}", f"{ours}/{place}")
        ),
        *dense_rules(f"{theirs}.nn.0", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.nn.2", f"{ours}/mlp/down"),
        *dense_rules(f"{theirs}.mlp_r_ij.0", f"{ours}/gate/up"),
        *dense_rules(f"{theirs}.mlp_r_ij.2", f"{ours}/gate/down"),
        *(rule for name in "ABCDE" for rule in dense_rules(f"{theirs}.{name}", f"{ours}/{name}")),
    ]
