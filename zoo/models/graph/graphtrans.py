"""GraphTrans: messages along edges, then a transformer over all nodes of a graph.

Wu, Jain et al., "Representing Long-Range Context for Graph Neural Networks with Global Attention",
NeurIPS 2021, arXiv 2201.08821; official code github.com/ucbrise/graphtrans (Apache-2.0).

    h_0 = E(node);   h_(l+1) = relu(BN(messages(h_l)))         no relu behind the last; L layers
    GIN     MLP((1 + eps) h_i + sum_j relu(h_j + e_ij))        MLP with a BN inside
    GCN     sum_j relu(W h_j + e_ij) / sqrt(deg_i deg_j) + relu(W h_i + r) / deg_i
    x = LN(W [h_0 | h_L]);   a class token and layers of attention and MLP, each behind its sum

What a graph is read from is the class token, or its last node. With a virtual node each layer adds
a vector of the graph to its nodes, and renews it from their sum. Jumping knowledge takes the last
features, the sum of all before the last (as the code does), or the first and the last side by side.
Positions, where there are any, count from the front of the longest graph of a batch, so that
the last nodes of all graphs have the same; a class token has none.

    features            graphtrans_nci1
    nodes               30  128    behind the messages, for 30 nodes
    layer0              31  128    the class token first, up to layer2
    logits              2
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from zoo.checkpoints.rules import (
    Rule,
    Rules,
    batch_norm_rules,
    dense_rules,
    linear,
    norm_rules,
    squeeze,
)
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
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.position import sinusoids
from zoo.system import System, Variant

MAX_POSITIONS = 5000  # rows of the table in official files


class Messages(nn.Module):
    """One layer of GIN or GCN, with the embedding of its edges.

    Attributes:
      kind: `gin` or `gcn`.
      edge_numbers: values of each feature of an edge; none: edges are alike.
      edge_dim: real numbers of an edge, in place of them.
    """

    kind: str
    edge_numbers: tuple[int, ...] = ()
    edge_dim: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch nodes channels"],
        edges: Int[Array, "batch edges 2"],
        edge_features: Shaped[Array, "batch edges features"],
        real: Bool[Array, "batch nodes"],
        train: bool = False,
    ) -> Float[Array, "batch nodes channels"]:
        """What each node makes of its messages."""
        channels, size = x.shape[-1], x.shape[1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        source, target = edges[..., 0], edges[..., 1]
        edge = 0.0
        if self.edge_numbers:
            embed = SumOfEmbeddings(self.edge_numbers, channels, name="embed_edge", **types)
            edge = embed(edge_features)
        elif self.edge_dim:
            edge = Dense(channels, name="embed_edge", **types)(edge_features)
        if self.kind == "gcn":
            x = Dense(channels, name="linear", **types)(x)
            there = (target < size).astype(self.dtype)[..., None]
            degree = sum_at_nodes(there, source, size) + 1
            scale = at_nodes(degree, source) * at_nodes(degree, target)
            y = sum_at_nodes(nn.relu(at_nodes(x, source) + edge) / jnp.sqrt(scale), target, size)
            root = self.param("root", nn.initializers.normal(1.0), (channels,), self.param_dtype)
            return y + nn.relu(x + root.astype(self.dtype)) / degree
        epsilon = self.param("epsilon", nn.initializers.zeros, (1,), self.param_dtype)
        y = sum_at_nodes(nn.relu(at_nodes(x, source) + edge), target, size)
        y = (1 + epsilon.astype(self.dtype)) * x + y
        y = Dense(2 * channels, name="expand", **types)(y)
        y = nn.relu(NodeBatchNorm(name="norm", **types)(y, real, train))
        return Dense(channels, name="reduce", **types)(y)


class VirtualNode(nn.Module):
    """What a graph's vector becomes: an MLP with batch norms over graphs."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch channels"], train: bool = False
    ) -> Float[Array, "batch channels"]:
        """The vector."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for width, name, norm in (
            (2 * x.shape[-1], "expand", "norm1"),
            (x.shape[-1], "reduce", "norm2"),
        ):
            x = Dense(width, name=name, **types)(x)
            x = nn.relu(NodeBatchNorm(name=norm, **types)(x, None, train))
        return x


class EncoderLayer(nn.Module):
    """Attention and an MLP, each followed by its residual sum and a norm."""

    num_heads: int
    mlp_dim: int
    activation: str = "relu"
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        visible: Bool[Array, "batch tokens"],
        train: bool = False,
    ) -> Float[Array, "batch tokens channels"]:
        """The tokens after the layer."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        init = nn.initializers.xavier_uniform()
        attend = Attention(
            self.num_heads, attention_dropout=self.dropout, kernel_init=init, name="attention",
            **types,
        )  # fmt: skip
        activation = ACTIVATIONS[self.activation]
        mlp = Mlp(self.mlp_dim, activation, self.dropout, kernel_init=init, name="mlp", **types)
        norm1, norm2 = (LayerNorm(epsilon=1e-5, name=f"norm{i}", **types) for i in (1, 2))
        x = norm1(x + drop(attend(x, visible, train)))
        x = norm2(x + mlp(x, train))
        return constrain(x, "batch", "length", "channels")


class GraphTrans(Model):
    """GraphTrans for graphs of any size, padded to one.

    Attributes:
      node_numbers: values of each feature of a node; none: `node_features` real numbers.
      node_features: real numbers of a node.
      edge_numbers: values of each feature of an edge; none: edges are alike.
      edge_dim: real numbers of an edge, in place of them.
      gnn: kind of messages.
      gnn_depth: layers of messages.
      gnn_dim: channels of them.
      virtual_node: whether a vector of the graph goes along.
      residual: whether layers of messages are added to what they get.
      jump: what of the layers' features is used.
      embed_dim: channels of the transformer.
      depth: its layers; 0: the last node is read as it comes, and the class token and the norms,
        which official files hold all the same, are passed over.
      num_heads: its heads.
      mlp_dim: width of its MLPs.
      activation: of its MLPs.
      norm_input: whether its input is normalised.
      positions: whether nodes have positions.
      max_tokens: the transformer sees so many nodes of a graph, its last ones; 0: all.
      pool: what a graph is read from.
      num_classes: outputs.
      num_heads_out: heads of `num_classes` outputs each (code2 reads five words); 0: one.
      max_nodes, max_edges: of `example_inputs`.
      gnn_dropout, dropout: rates in messages and in the transformer.
    """

    node_numbers: tuple[int, ...] = ()
    node_features: int = 37
    edge_numbers: tuple[int, ...] = ()
    edge_dim: int = 0
    gnn: Literal["gin", "gcn"] = "gcn"
    gnn_depth: int = 5
    gnn_dim: int = 128
    virtual_node: bool = False
    residual: bool = False
    jump: Literal["last", "sum", "cat"] = "last"
    embed_dim: int = 128
    depth: int = 3
    num_heads: int = 4
    mlp_dim: int = 256
    activation: str = "relu"
    norm_input: bool = True
    positions: bool = False
    max_tokens: int = 0
    pool: Literal["cls", "last"] = "cls"
    num_classes: int = 2
    num_heads_out: int = 0
    max_nodes: int = 30
    max_edges: int = 64
    gnn_dropout: float = 0.0
    dropout: float = 0.3
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        whole = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        nodes = (batch_size, self.max_nodes, len(self.node_numbers) or self.node_features)
        kind = jnp.int32 if self.node_numbers else jnp.float32
        width = self.edge_dim or len(self.edge_numbers) or 1
        edge_kind = jnp.float32 if self.edge_dim else jnp.int32
        return {
            "nodes": jax.ShapeDtypeStruct(nodes, kind),
            "edges": whole((batch_size, self.max_edges, 2)),
            "edge_features": jax.ShapeDtypeStruct((batch_size, self.max_edges, width), edge_kind),
            "num_nodes": whole((batch_size,)),
        }

    def __call__(
        self,
        nodes: Array,
        edges: Int[Array, "batch edges 2"],
        edge_features: Array,
        num_nodes: Int[Array, "batch"],
        train: bool = False,
    ) -> Float[Array, "batch ... classes"]:
        """The outputs of each graph."""
        return self.features(nodes, edges, edge_features, num_nodes, train)["logits"]

    @nn.compact
    def features(
        self,
        nodes: Array,
        edges: Int[Array, "batch edges 2"],
        edge_features: Array,
        num_nodes: Int[Array, "batch"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Args:
          nodes: features of each node, numbers of tables or real numbers.
          edges: source and target of each edge; of padding, a target past the last node.
          edge_features: of each edge, numbers of tables or real numbers.
          num_nodes: how many nodes of each graph are real.
          train: whether to drop out and to normalise by the batch.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        real = real_nodes(num_nodes, nodes.shape[1])
        h = self._messages(nodes, edges, edge_features, real, train)
        out = {"nodes": h}
        x = Dense(self.embed_dim, name="embed", **types)(h)
        longest = min(x.shape[1], self.max_tokens or x.shape[1])
        place = longest - num_nodes[:, None] + jnp.arange(x.shape[1])
        if self.positions:
            table = jnp.asarray(sinusoids(longest, self.embed_dim), self.dtype)
            x = x + table[jnp.clip(place, 0, longest - 1)]
        bare, visible = x, real & (place >= 0)
        if self.pool == "cls":
            normal = nn.initializers.normal(1.0)
            token = self.param("class_token", normal, (1, 1, self.embed_dim), self.param_dtype)
            token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.embed_dim))
            x = jnp.concatenate([token, x], 1)
            visible = jnp.pad(visible, ((0, 0), (1, 0)), constant_values=True)
        if self.norm_input:
            x = LayerNorm(epsilon=1e-5, name="norm_input", **types)(x)
        for i in range(self.depth):
            layer = EncoderLayer(
                self.num_heads, self.mlp_dim, self.activation, self.dropout,
                name=f"layers_{i}", **types,
            )  # fmt: skip
            x = layer(x, visible, train)
            out[f"layer{i}"] = x
        x = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        last = jnp.maximum(num_nodes - 1, 0)
        if self.depth:
            last = jnp.zeros_like(num_nodes) if self.pool == "cls" else last
        else:
            x = bare
        pooled = jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]
        out["pooled"] = pooled
        if not self.num_heads_out:
            return out | {"logits": Dense(self.num_classes, name="head", **types)(pooled)}
        heads = [
            Dense(self.num_classes, name=f"head_{i}", **types)(pooled)
            for i in range(self.num_heads_out)
        ]
        return out | {"logits": jnp.stack(heads, 1)}

    def _messages(
        self, nodes: Array, edges: Array, edge_features: Array, real: Array, train: bool
    ) -> Float[Array, "batch nodes channels"]:
        """The features of nodes that the layers of messages make."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.gnn_dropout, deterministic=not train)
        if self.node_numbers:
            embed = SumOfEmbeddings(self.node_numbers, self.gnn_dim, name="embed_node", **types)
        else:
            embed = Dense(self.gnn_dim, name="embed_node", **types)
        h = jnp.where(real[..., None], embed(nodes), 0)
        graph = None
        if self.virtual_node:
            zeros = nn.initializers.zeros
            shape = (1, self.gnn_dim)
            graph = self.param("virtual_embedding", zeros, shape, self.param_dtype)
            graph = jnp.broadcast_to(graph.astype(self.dtype), (h.shape[0], self.gnn_dim))
        layers = []
        for i in range(self.gnn_depth):
            if graph is not None:
                h = jnp.where(real[..., None], h + graph[:, None], 0)
            layers.append(h)
            sizes = (self.gnn, self.edge_numbers, self.edge_dim)
            messages = Messages(*sizes, name=f"messages_{i}", **types)
            y = messages(h, edges, edge_features, real, train)
            y = NodeBatchNorm(name=f"message_norm_{i}", **types)(y, real, train)
            last = i == self.gnn_depth - 1
            y = drop(y if last else nn.relu(y))
            if graph is not None and not last:
                renewed = VirtualNode(name=f"virtual_{i}", **types)(h.sum(1) + graph, train)
                graph = graph + drop(renewed) if self.residual else drop(renewed)
            h = y + h if self.residual else y
            h = jnp.where(real[..., None], h, 0)
        if self.jump == "sum":
            return sum(layers)
        return h if self.jump == "last" else jnp.concatenate([layers[0], h], -1)


# ---------------------------------------------------------------------------- checkpoints


def _rules(code: bool = False) -> Rules:
    """`code`: nodes are those of syntax trees, with a type, an attribute and a depth."""
    gnn, encoder = "gnn_node.", "transformer_encoder."
    conv, norm = f"{gnn}convs.{{i}}", f"{gnn}batch_norms.{{i}}"
    virtual = f"{gnn}mlp_virtualnode_list.{{i}}"
    theirs, ours = f"{encoder}transformer.layers.{{i}}", "layers_{i}"
    tables = [
        Rule(f"{gnn}node_encoder.atom_embedding_list.{{k}}.weight", "embed_node/table{k}_embedding")
    ]
    if code:
        tables = [
            Rule(f"{gnn}node_encoder.{name}_encoder.weight", f"embed_node/table{k}_embedding")
            for k, name in enumerate(("type", "attribute", "depth"))
        ]
    rules = [
        *tables,
        *dense_rules(f"{gnn}node_encoder", "embed_node"),
        Rule(
            f"{conv}.edge_encoder.bond_embedding_list.{{k}}.weight",
            "messages_{i}/embed_edge/table{k}_embedding",
        ),
        *dense_rules(f"{conv}.edge_encoder", "messages_{i}/embed_edge"),
        Rule(f"{conv}.eps", "messages_{i}/epsilon"),
        *dense_rules(f"{conv}.mlp.0", "messages_{i}/expand"),
        *batch_norm_rules(f"{conv}.mlp.1", "messages_{i}/norm"),
        *dense_rules(f"{conv}.mlp.3", "messages_{i}/reduce"),
        *dense_rules(f"{conv}.linear", "messages_{i}/linear"),
        Rule(f"{conv}.root_emb.weight", "messages_{i}/root", squeeze(0)),
        *batch_norm_rules(norm, "message_norm_{i}"),
        Rule(f"{gnn}virtualnode_embedding.weight", "virtual_embedding"),
        *dense_rules(f"{virtual}.0", "virtual_{i}/expand"),
        *batch_norm_rules(f"{virtual}.1", "virtual_{i}/norm1"),
        *dense_rules(f"{virtual}.3", "virtual_{i}/reduce"),
        *batch_norm_rules(f"{virtual}.4", "virtual_{i}/norm2"),
        *dense_rules("gnn2transformer", "embed"),
        Rule(f"{encoder}cls_embedding", "class_token"),
        *norm_rules(f"{encoder}norm_input", "norm_input"),
        Rule(f"{theirs}.self_attn.in_proj_weight", f"{ours}/attention/qkv/kernel", linear),
        Rule(f"{theirs}.self_attn.in_proj_bias", f"{ours}/attention/qkv/bias"),
        *dense_rules(f"{theirs}.self_attn.out_proj", f"{ours}/attention/out"),
        *dense_rules(f"{theirs}.linear1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.linear2", f"{ours}/mlp/down"),
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *norm_rules(f"{encoder}transformer.norm", "norm"),
        *dense_rules("graph_pred_linear", "head"),
        *dense_rules("graph_pred_linear_list.{i}", "head_{i}"),
    ]
    derived = {
        f"{norm}.num_batches_tracked": _counter,
        f"{conv}.mlp.1.num_batches_tracked": _gin_counter,
        f"{virtual}.1.num_batches_tracked": _virtual_counter,
        f"{virtual}.4.num_batches_tracked": _virtual_counter,
        "pos_encoder.pe": _positions,
    }
    return Rules(rules, derived=derived, fresh=("head/*", "head_{i}/*"))


def _counter(model: GraphTrans, i: int = 0) -> np.ndarray | None:
    return np.zeros((), np.int64) if i < model.gnn_depth else None


def _gin_counter(model: GraphTrans, i: int) -> np.ndarray | None:
    return _counter(model, i) if model.gnn == "gin" else None


def _virtual_counter(model: GraphTrans, i: int) -> np.ndarray | None:
    return _counter(model, i + 1) if model.virtual_node else None


def _positions(model: GraphTrans) -> np.ndarray | None:
    table = sinusoids(MAX_POSITIONS, model.embed_dim, np.float32)[:, None]
    return table if model.positions else None


LAYOUTS = {"official": _rules(), "official_code2": _rules(code=True)}

_COMMON = dict(
    module=GraphTrans,
    task="graph_classification",
    paper="Representing Long-Range Context for Graph Neural Networks with Global Attention, "
    "arXiv 2201.08821",
    code="github.com/ucbrise/graphtrans",
    licence="Apache-2.0",
)

VARIANTS: dict[str, Variant] = {
    "graphtrans_nci1": Variant(fields={}, params=504_194, **_COMMON),
    "graphtrans_nci1_gin": Variant(
        fields=dict(gnn="gin", gnn_dim=300, depth=4), params=2_394_251, **_COMMON
    ),
    "graphtrans_molpcba": Variant(
        fields=dict(node_numbers=ATOM_NUMBERS, edge_numbers=BOND_NUMBERS, gnn="gin", gnn_dim=300,
                    virtual_node=True, jump="cat", depth=4, mlp_dim=512, num_classes=128),
        params=4_223_473,
        **_COMMON,
    ),
    "graphtrans_test": Variant(
        fields=dict(node_numbers=(5, 3), edge_numbers=(4,), gnn="gin", gnn_depth=2, gnn_dim=32,
                    virtual_node=True, jump="cat", embed_dim=32, depth=2, mlp_dim=64, max_nodes=6,
                    max_edges=8, dropout=0.1),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, no_decay=("virtual_embedding",))
