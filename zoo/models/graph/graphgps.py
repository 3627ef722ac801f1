"""GraphGPS: message passing along edges and attention between all nodes, side by side.

Rampasek et al., "Recipe for a General, Powerful, Scalable Graph Transformer", NeurIPS 2022, arXiv
2205.12454; official code github.com/rampasek/GraphGPS (MIT), whose names we follow.

    x_i = [E(type_i) | W BN(p_i)]                      p: chances that a random walk is back after k
    local   = BN(x + messages(x, e));   global = BN(x + attention(x))
    s = local + global;   x = BN(s + W2 relu(W1 s))    W1 twice as wide; `depth` times
    messages of GINE       MLP(x_i + sum_j relu(x_j + e_ij))
    messages of gated GCN  see `GatedMessages`, which also changes e
    logits = MLP(sum or mean of x_i)                   widths halve twice

Isotropic messages of GIN leave the edges out. Norms are over the real nodes of a batch.

    features            graphgps_zinc
    embed               12  64    for 12 nodes
    layer0              12  64    up to layer9
    pooled              64
    logits              1
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules, linear
from zoo.layers.attention import Attention
from zoo.layers.dense import Dense
from zoo.layers.graph import (
    ATOM_NUMBERS,
    BOND_NUMBERS,
    NodeBatchNorm,
    SumOfEmbeddings,
    at_nodes,
    real_nodes,
    sum_at_nodes,
)
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.system import System, Variant


def return_chances(
    edges: Int[np.ndarray, "2 edges"], count: int, steps: int
) -> Float[np.ndarray, "nodes steps"]:
    """The chance that a random walk is back at its start after 1, 2, ... steps."""
    adjacency = np.zeros((count, count))
    np.add.at(adjacency, (edges[0], edges[1]), 1.0)
    degree = adjacency.sum(1, keepdims=True)
    walk = np.divide(adjacency, degree, out=np.zeros_like(adjacency), where=degree > 0)
    power, chances = np.eye(count), []
    for _ in range(steps):
        power = power @ walk
        chances.append(np.diag(power))
    return np.stack(chances, 1).astype(np.float32)


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
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
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
    ) -> tuple[Float[Array, "batch nodes channels"], Float[Array, "batch edges channels"]]:
        """The nodes and the edges, renewed."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        a, b, c, d, e = (Dense(x.shape[-1], name=name, **types) for name in "ABCDE")
        gate = at_nodes(d(x), target) + at_nodes(e(x), source) + c(edge)
        share = nn.sigmoid(gate)
        total = partial(sum_at_nodes, target=target, size=x.shape[1])
        y = a(x) + total(share * at_nodes(b(x), source)) / (total(share) + 1e-6)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        act = ACTIVATIONS[self.activation]
        y = drop(act(NodeBatchNorm(name="norm_node", **types)(y, real, train)))
        there = target < x.shape[1]
        gate = drop(act(NodeBatchNorm(name="norm_edge", **types)(gate, there, train)))
        return (x + y, edge + gate) if self.residual else (y, gate)


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


NORMS = {"batch": NodeBatchNorm, "graph": GraphLayerNorm, "none": NoNorm}


class GPSLayer(nn.Module):
    """Messages and attention from the same nodes, summed; then an MLP.

    Attributes:
      local: kind of messages, or none.
      attend: whether there is attention.
      num_heads: of it.
      activation: of the MLP, and of that of the messages.
      dropout: rate behind each branch.
      attention_dropout: rate on attention weights.
      norm: kind of the norms behind the branches and the MLP (`NORMS`).
    """

    local: str
    attend: bool
    num_heads: int
    activation: str = "relu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm: str = "batch"
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
    ) -> tuple[Float[Array, "batch nodes channels"], Float[Array, "batch edges channels"]]:
        """The nodes and the edges after the layer."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = partial(NORMS[self.norm], **types)
        ways = []
        if self.local == "gated":
            gated = GatedMessages(self.dropout, True, self.activation, name="local", **types)
            y, edge = gated(x, edge, source, target, real, train)
            ways.append(norm(name="norm_local")(y, real, train))
        elif self.local == "gcn":
            y = x + drop(ConvolvedMessages(name="local", **types)(x, source, target))
            ways.append(norm(name="norm_local")(y, real, train))
        elif self.local != "none":
            sizes = (self.local == "gine", self.activation)
            messages = IsotropicMessages(*sizes, name="local", **types)
            y = x + drop(messages(x, edge, source, target))
            ways.append(norm(name="norm_local")(y, real, train))
        if self.attend:
            attention = Attention(
                self.num_heads,
                attention_dropout=self.attention_dropout,
                kernel_init=nn.initializers.xavier_uniform(),
                name="attention",
                **types,
            )
            y = x + drop(attention(x, real, train))
            ways.append(norm(name="norm_attention")(y, real, train))
        x = sum(ways)
        activation = ACTIVATIONS[self.activation]
        mlp = Mlp(2 * x.shape[-1], activation, self.dropout, name="mlp", **types)
        x = norm(name="norm2")(x + mlp(x, train), real, train)
        return constrain(x, "batch", "length", "channels"), edge


class GraphGPS(Model):
    """GraphGPS for graphs of any size, padded to one.

    Attributes:
      node_numbers: values of each feature of a node.
      edge_numbers: values of each feature of an edge.
      walk_steps: steps of the random walks; 0: no positions.
      position_dim: channels of the positions.
      embed_dim: channels.
      depth: layers.
      num_heads: heads.
      local: kind of messages: `gine`, `gin` and `gcn` (without edges), `gated`, or `none`.
      attend: whether there is attention beside the messages.
      norm: of the layers: over the batch, over each graph, or none.
      pool: how nodes become a graph: `add`, `mean` or `max`.
      head_layers: times that the width halves in the head.
      num_classes: outputs.
      activation: of the MLPs.
      max_nodes, max_edges: of `example_inputs`.
      dropout: rate behind each branch.
      attention_dropout: rate on attention weights.
    """

    node_numbers: tuple[int, ...] = (28,)
    edge_numbers: tuple[int, ...] = (4,)
    walk_steps: int = 20
    position_dim: int = 28
    embed_dim: int = 64
    depth: int = 10
    num_heads: int = 4
    local: Literal["gine", "gin", "gcn", "gated", "none"] = "gine"
    attend: bool = True
    norm: Literal["batch", "graph", "none"] = "batch"
    pool: Literal["add", "mean", "max"] = "add"
    head_layers: int = 2
    num_classes: int = 1
    activation: str = "relu"
    max_nodes: int = 12
    max_edges: int = 26
    dropout: float = 0.0
    attention_dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        whole = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        walks = (batch_size, self.max_nodes, self.walk_steps)
        return {
            "nodes": whole((batch_size, self.max_nodes, len(self.node_numbers))),
            "edges": whole((batch_size, self.max_edges, 2)),
            "edge_features": whole((batch_size, self.max_edges, len(self.edge_numbers))),
            "num_nodes": whole((batch_size,)),
            "walks": jax.ShapeDtypeStruct(walks, jnp.float32),
        }

    def __call__(
        self,
        nodes: Int[Array, "batch nodes features"],
        edges: Int[Array, "batch edges 2"],
        edge_features: Int[Array, "batch edges edge_features"],
        num_nodes: Int[Array, "batch"],
        walks: Float[Array, "batch nodes steps"],
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """The outputs of each graph."""
        return self.features(nodes, edges, edge_features, num_nodes, walks, train)["logits"]

    @nn.compact
    def features(
        self,
        nodes: Int[Array, "batch nodes features"],
        edges: Int[Array, "batch edges 2"],
        edge_features: Int[Array, "batch edges edge_features"],
        num_nodes: Int[Array, "batch"],
        walks: Float[Array, "batch nodes steps"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Args:
          nodes: numbers of the features of each node.
          edges: source and target of each edge; of padding, a target past the last node.
          edge_features: numbers of the features of each edge.
          num_nodes: how many nodes of each graph are real.
          walks: of each node (`return_chances`).
          train: whether to drop out and to normalise by the batch.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        real = real_nodes(num_nodes, nodes.shape[1])
        source, target = edges[..., 0], edges[..., 1]
        width = self.embed_dim - (self.position_dim if self.walk_steps else 0)
        x = SumOfEmbeddings(self.node_numbers, width, name="embed_node", **types)(nodes)
        if self.walk_steps:
            p = NodeBatchNorm(name="norm_position", **types)(walks, real, train)
            p = Dense(self.position_dim, name="embed_position", **types)(p)
            x = jnp.concatenate([x, p], -1)
        x = jnp.where(real[..., None], x, 0)
        embed = SumOfEmbeddings(self.edge_numbers, self.embed_dim, name="embed_edge", **types)
        edge = embed(edge_features)
        out = {"embed": x}
        for i in range(self.depth):
            layer = GPSLayer(
                self.local,
                self.attend,
                self.num_heads,
                self.activation,
                self.dropout,
                self.attention_dropout,
                self.norm,
                name=f"layers_{i}",
                **types,
            )
            x, edge = layer(x, edge, source, target, real, train)
            out[f"layer{i}"] = x
        y = out["pooled"] = pooled(x, real, self.pool)
        for i in range(self.head_layers):
            y = Dense(self.embed_dim // 2 ** (i + 1), name=f"head_{i}", **types)(y)
            y = ACTIVATIONS[self.activation](y)
        last = Dense(self.num_classes, name=f"head_{self.head_layers}", **types)
        return out | {"logits": last(y)}


def pooled(
    x: Float[Array, "batch nodes channels"], real: Bool[Array, "batch nodes"], how: str
) -> Float[Array, "batch channels"]:
    """The sum, mean or maximum of the real nodes."""
    if how == "max":
        lowest = jnp.where(real.any(1)[:, None, None], jnp.finfo(x.dtype).min, 0)
        return jnp.where(real[..., None], x, lowest).max(1)
    total = jnp.where(real[..., None], x, 0).sum(1)
    if how == "add":
        return total
    return total / jnp.maximum(real.sum(1), 1).astype(x.dtype)[:, None]


# ---------------------------------------------------------------------------- checkpoints


def _rules(prefix: str = "", atoms: bool = False) -> Rules:
    """`atoms`: with the tables of OGB's encoders of atoms and bonds, else with one of types."""
    theirs, ours = f"{prefix}layers.{{i}}", "layers_{i}"
    node, edge = f"{prefix}encoder.node_encoder.encoder", f"{prefix}encoder.edge_encoder."
    norms = (
        ("norm1_local", "norm_local"),
        ("norm1_attn", "norm_attention"),
        ("norm2", "norm2"),
        ("local_model.bn_node_x", "local/norm_node"),
        ("local_model.bn_edge_e", "local/norm_edge"),
    )

    tables = [
        Rule(f"{node}1.encoder.weight", "embed_node/table0_embedding"),
        Rule(f"{edge}encoder.weight", "embed_edge/table0_embedding"),
    ]
    if atoms:
        tables = [
            Rule(f"{node}1.atom_embedding_list.{{k}}.weight", "embed_node/table{k}_embedding"),
            Rule(f"{edge}bond_embedding_list.{{k}}.weight", "embed_edge/table{k}_embedding"),
        ]
    rules = [
        *tables,
        *batch_norm_rules(f"{node}2.raw_norm", "norm_position"),
        *dense_rules(f"{node}2.pe_encoder", "embed_position"),
        *(rule for a, b in norms for rule in batch_norm_rules(f"{theirs}.{a}", f"{ours}/{b}")),
        Rule(f"{theirs}.local_model.lin.weight", f"{ours}/local/map/kernel", linear),
        Rule(f"{theirs}.local_model.bias", f"{ours}/local/bias"),
        *dense_rules(f"{theirs}.local_model.nn.0", f"{ours}/local/mlp/up"),
        *dense_rules(f"{theirs}.local_model.nn.2", f"{ours}/local/mlp/down"),
        *(
            rule
            for name in "ABCDE"
            for rule in dense_rules(f"{theirs}.local_model.{name}", f"{ours}/local/{name}")
        ),
        Rule(f"{theirs}.self_attn.in_proj_weight", f"{ours}/attention/qkv/kernel", linear),
        Rule(f"{theirs}.self_attn.in_proj_bias", f"{ours}/attention/qkv/bias"),
        *dense_rules(f"{theirs}.self_attn.out_proj", f"{ours}/attention/out"),
        *dense_rules(f"{theirs}.ff_linear1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.ff_linear2", f"{ours}/mlp/down"),
    ]
    derived = {
        f"{theirs}.{name}.num_batches_tracked": _edge_counter if "bn_" in name else _norm_counter
        for name, _ in norms
    }
    derived[f"{node}2.raw_norm.num_batches_tracked"] = _counter
    head = f"{prefix}post_mp.FC_layers"
    return Rules(
        (*rules, *dense_rules(f"{head}.{{i}}", "head_{i}")),
        derived={f"{theirs}.local_model.eps": _epsilon, **derived},
        fresh=("head_*/*",),
    )


def _counter(model: GraphGPS, i: int = 0) -> np.ndarray:
    return np.zeros((), np.int64)


def _norm_counter(model: GraphGPS, i: int) -> np.ndarray | None:
    return np.zeros((), np.int64) if model.norm == "batch" else None


def _edge_counter(model: GraphGPS, i: int) -> np.ndarray | None:
    return np.zeros((), np.int64) if model.local == "gated" else None


def _epsilon(model: GraphGPS, i: int) -> np.ndarray | None:
    """GINE's epsilon, which is fixed at 0."""
    return np.zeros(1, np.float32) if model.local in ("gine", "gin") and i < model.depth else None


LAYOUTS = {
    "types": _rules(),
    "atoms": _rules(atoms=True),
    "graphgym_types": _rules("model."),
    "graphgym_atoms": _rules("model.", atoms=True),
}

_COMMON = dict(
    module=GraphGPS,
    paper="Recipe for a General, Powerful, Scalable Graph Transformer, arXiv 2205.12454",
    code="github.com/rampasek/GraphGPS",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "graphgps_zinc": Variant(fields={}, task="graph_regression", params=423_717, **_COMMON),
    "graphgps_molhiv": Variant(
        fields=dict(node_numbers=ATOM_NUMBERS, edge_numbers=BOND_NUMBERS, walk_steps=16,
                    position_dim=16, local="gated", pool="mean", dropout=0.05),
        task="graph_classification",
        params=558_673,
        **_COMMON,
    ),
    "graphgps_test": Variant(
        fields=dict(node_numbers=(5, 3), edge_numbers=(4,), walk_steps=4, position_dim=8,
                    embed_dim=32, depth=2, num_classes=2, max_nodes=6, max_edges=8,
                    attention_dropout=0.0, pool="mean"),
        task="graph_classification",
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
