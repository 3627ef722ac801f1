"""Graphormer: a transformer whose attention is biased by the structure of a graph.

Ying et al., "Do Transformers Really Perform Bad for Graph Representation?", NeurIPS 2021, arXiv
2106.05234; official code github.com/microsoft/Graphormer (MIT), whose names we follow.

    x_i = sum_j E_node(feature_j) + E_in(degree_i) + E_out(degree_i);   x_0 = a learned graph token
    b_ij = E_distance(hops_ij) + edges_ij + the bias of the graph token        a number a head
    edges_ij = 1 / hops_ij sum_k W_k mean_f E_edge(feature f of edge k on the path from i to j)
    x = LN(x);   x = LN(x + attention(x, b));   x = LN(x + W2 gelu(W1 x))      or norms in front
    logits = E LN(gelu(W x)) + a number                                        read at token 0

Queries are scaled behind their bias. With `edge_type="simple"` the edge term is that of the direct
edge alone. Numbers of nodes, degrees, distances and edges begin at 1; 0 is padding, which nobody
sees. `zoo.data.graphs` makes the inputs from a graph. The last norm of the form with norms in front
and the pooler of masked modelling are in published files and are never read.

    features            graphormer_slim
    embed               13  80    the graph token and 12 nodes
    layer0              13  80    up to layer11
    token_logits        13  1     of every token
    logits              1         of the graph token
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, Transform, dense_rules, linear, norm_rules, reshape
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.system import System, Variant

init = nn.initializers.normal(0.02)


def padded_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Normal numbers, and zeros in row 0."""
    return init(key, shape, dtype).at[0].set(0)


def padded(table: Float[Array, "rows channels"]) -> Float[Array, "rows channels"]:
    """A table whose row 0, the one of padding, is not trained."""
    return jnp.concatenate([jax.lax.stop_gradient(table[:1]), table[1:]])


class StructureBias(nn.Module):
    """The bias of each head on the scores between all tokens, the graph token first.

    Attributes:
      num_heads: heads.
      num_edges: highest number of an edge feature.
      num_spatial: numbers of distances.
      num_edge_dis: hops that have a matrix of their own.
      edge_type: edges along the path, or the direct edge.
      max_hops: hops of a path that count; 0: all that are given.
    """

    num_heads: int
    num_edges: int
    num_spatial: int
    num_edge_dis: int
    edge_type: str
    max_hops: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, distance: Int[Array, "batch nodes nodes"], edges: Int[Array, "batch nodes nodes ..."]
    ) -> Float[Array, "batch heads tokens tokens"]:
        """The bias, without padding's."""
        heads = self.num_heads

        def table(name: str, size: int) -> Array:
            shape = (size, heads)
            return padded(self.param(f"{name}_embedding", padded_init, shape, self.param_dtype))

        bias = table("distance", self.num_spatial)[distance]
        of_edges = table("edge", self.num_edges + 1)[edges].mean(-2)
        if self.edge_type == "multi_hop":
            hops = jnp.where(distance > 1, distance - 1, 1)
            hops = jnp.clip(hops, 0, self.max_hops) if self.max_hops > 0 else hops
            steps = edges.shape[3] if self.max_hops <= 0 else min(self.max_hops, edges.shape[3])
            shape = (self.num_edge_dis, heads, heads)
            matrices = self.param("hop_kernel", init, shape, self.param_dtype)
            of_edges = jnp.einsum("bijkn,knm->bijm", of_edges[..., :steps, :], matrices[:steps])
            of_edges = of_edges / hops[..., None]
        bias = jnp.moveaxis(bias + of_edges, -1, 1)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (1, 0), (1, 0)))
        shape = (1, heads)
        virtual = self.param("graph_token_distance_embedding", init, shape, self.param_dtype)
        virtual = virtual[0][:, None]
        bias = bias.at[:, :, 1:, 0].add(virtual)
        return bias.at[:, :, 0, :].add(virtual)


class BiasedAttention(nn.Module):
    """Multi-head attention with a bias; queries are scaled behind their own bias."""

    num_heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        bias: Float[Array, "batch heads tokens tokens"],
        train: bool = False,
    ) -> Float[Array, "batch tokens channels"]:
        """The attended tokens."""
        batch, length, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": init}
        heads = (batch, length, self.num_heads, channels // self.num_heads)
        query, key, value = (
            constrain(Dense(channels, name=name, **types)(x).reshape(heads),
                      "batch", "length", "heads", "head_dim")
            for name in ("query", "key", "value")
        )  # fmt: skip
        dropping = train and self.dropout > 0
        y = kernels_pallas.attention(
            query,
            key,
            value,
            bias=bias,
            dropout=self.dropout if dropping else 0.0,
            rng=self.make_rng("dropout") if dropping else None,
        )
        return Dense(channels, name="out", **types)(y.reshape(x.shape))


class GraphormerLayer(nn.Module):
    """Attention and an MLP with residual sums, each behind a norm or in front of one."""

    num_heads: int
    mlp_dim: int
    pre_norm: bool
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        bias: Float[Array, "batch heads tokens tokens"],
        train: bool = False,
    ) -> Float[Array, "batch tokens channels"]:
        """The tokens after the layer."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attend = BiasedAttention(self.num_heads, self.attention_dropout, name="attention", **types)
        activation = ACTIVATIONS[self.activation]
        mlp = Mlp(self.mlp_dim, activation, kernel_init=init, name="mlp", **types)
        norms = [LayerNorm(epsilon=1e-5, name=f"norm{i}", **types) for i in (1, 2)]
        for norm, branch in zip(
            norms, (lambda y: attend(y, bias, train), lambda y: mlp(y, train)), strict=True
        ):
            if self.pre_norm:
                x = x + drop(branch(norm(x)))
            else:
                x = norm(x + drop(branch(x)))
        return constrain(x, "batch", "length", "channels")


class Graphormer(Model):
    """Graphormer for graphs of any size, padded to one.

    Attributes:
      num_nodes: highest number of a node feature.
      num_in_degree, num_out_degree: numbers of degrees.
      num_edges: highest number of an edge feature.
      num_spatial: numbers of distances.
      num_edge_dis: hops that have a matrix of their own.
      edge_type: `multi_hop`, or `simple` (anything else than multi_hop in the official code).
      max_hops: hops of a path that count; 0: all.
      max_distance: nodes at as many hops or more do not see each other.
      depth: layers.
      embed_dim: channels.
      mlp_dim: width of the MLPs.
      num_heads: heads.
      pre_norm: norms in front of the branches.
      norm_input: a norm in front of the first layer.
      activation: of the MLPs and the head.
      num_classes: outputs.
      masked_pooler: whether there is the pooler of masked modelling, as in the official files, but
        not in those of transformers. Nothing reads it.
      node_features, edge_features, max_nodes: of `example_inputs`.
      dropout: rate behind embeddings and branches.
      attention_dropout: rate on attention weights.
    """

    num_nodes: int = 4608
    num_in_degree: int = 512
    num_out_degree: int = 512
    num_edges: int = 1536
    num_spatial: int = 512
    num_edge_dis: int = 128
    edge_type: Literal["multi_hop", "simple"] = "multi_hop"
    max_hops: int = 5
    max_distance: int = 1024
    depth: int = 12
    embed_dim: int = 768
    mlp_dim: int = 768
    num_heads: int = 32
    pre_norm: bool = False
    norm_input: bool = True
    activation: str = "gelu"
    num_classes: int = 1
    masked_pooler: bool = True
    node_features: int = 9
    edge_features: int = 3
    max_nodes: int = 12
    dropout: float = 0.0
    attention_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        nodes, pairs = self.max_nodes, (batch_size, self.max_nodes, self.max_nodes)
        hops = (max(self.max_hops, 1),) if self.edge_type == "multi_hop" else ()
        shapes = {
            "nodes": (batch_size, nodes, self.node_features),
            "degree": (batch_size, nodes),
            "distance": pairs,
            "edges": (*pairs, *hops, self.edge_features),
        }
        return {k: jax.ShapeDtypeStruct(shape, jnp.int32) for k, shape in shapes.items()}

    def __call__(
        self,
        nodes: Int[Array, "batch nodes features"],
        degree: Int[Array, "batch nodes"],
        distance: Int[Array, "batch nodes nodes"],
        edges: Int[Array, "batch nodes nodes ..."],
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """The outputs of the graph token."""
        return self.features(nodes, degree, distance, edges, train)["logits"]

    @nn.compact
    def features(
        self,
        nodes: Int[Array, "batch nodes features"],
        degree: Int[Array, "batch nodes"],
        distance: Int[Array, "batch nodes nodes"],
        edges: Int[Array, "batch nodes nodes ..."],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above), and the bias of the scores.

        Args:
          nodes: numbers of the features of each node, 0 for padding.
          degree: of each node, plus 1; 0 for padding.
          distance: hops between two nodes, plus 1; 511 if there is no path, 0 for padding.
          edges: numbers of the features of each edge on the path (`multi_hop`: hops, features), or
            of the direct edge (features); 0 for none.
          train: whether to drop out.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = self.embed_dim

        def table(name: str, size: int) -> Array:
            made = self.param(name, padded_init, (size, channels), self.param_dtype)
            return padded(made).astype(self.dtype)

        x = table("node_embedding", self.num_nodes + 1)[nodes].sum(-2)
        x = x + table("in_degree_embedding", self.num_in_degree)[degree]
        x = x + table("out_degree_embedding", self.num_out_degree)[degree]
        token = self.param("graph_token", init, (1, channels), self.param_dtype)
        token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, channels))
        x = jnp.concatenate([token, x], 1)
        bias = StructureBias(
            self.num_heads,
            self.num_edges,
            self.num_spatial,
            self.num_edge_dis,
            self.edge_type,
            self.max_hops,
            self.param_dtype,
            name="bias",
        )(distance, edges)
        if self.norm_input:
            x = LayerNorm(epsilon=1e-5, name="embed_norm", **types)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        out = {"embed": x, "bias": bias}
        bias = jnp.where(self._hidden(nodes, distance)[:, None], -1e30, bias)
        for i in range(self.depth):
            layer = GraphormerLayer(
                self.num_heads,
                self.mlp_dim,
                self.pre_norm,
                self.activation,
                self.dropout,
                self.attention_dropout,
                name=f"layers_{i}",
                **types,
            )
            x = layer(x, bias, train)
            out[f"layer{i}"] = x
        self._unused()
        x = Dense(channels, name="transform", kernel_init=init, **types)(x)
        x = ACTIVATIONS[self.activation](x)
        x = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        shift = self.param("head_bias", nn.initializers.zeros, (1,), self.param_dtype)
        logits = Dense(self.num_classes, use_bias=False, name="head", kernel_init=init, **types)(x)
        logits = logits + shift.astype(self.dtype)
        return out | {"token_logits": logits, "logits": logits[:, 0]}

    def _hidden(self, nodes: Array, distance: Array) -> Array:
        """Which keys a query does not see: padding, and nodes that are too far."""
        padded = jnp.pad(nodes[:, :, 0] == 0, ((0, 0), (1, 0)))
        real = ~padded[:, 1:]
        far = (distance > self.max_distance) & real[:, :, None] & real[:, None]
        return padded[:, None] | jnp.pad(far, ((0, 0), (1, 0), (1, 0)))

    def _unused(self) -> None:
        """Leaves of published files that nothing reads."""
        shape = (self.embed_dim, self.embed_dim)
        if self.masked_pooler:
            self.param("unused_pooler_kernel", init, shape, self.param_dtype)
            self.param("unused_pooler_bias", nn.initializers.zeros, shape[:1], self.param_dtype)
        if self.pre_norm:
            for name, start in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros)):
                self.param(f"unused_norm_{name}", start, shape[:1], self.param_dtype)


# ---------------------------------------------------------------------------- checkpoints


def _rules(head: str = "encoder.embed_out", shift: str = "encoder.") -> Rules:
    """The authors' names with those of the head and of the number that is added to its outputs."""
    prefix = "encoder."
    graph = f"{prefix}graph_encoder."
    features, bias = f"{graph}graph_node_feature.", f"{graph}graph_attn_bias."
    theirs, ours = f"{graph}layers.{{i}}", "layers_{i}"
    attention = [
        rule
        for a, b in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"),
                     ("out_proj", "out"))
        for rule in dense_rules(f"{theirs}.self_attn.{a}", f"{ours}/attention/{b}")
    ]  # fmt: skip

    def hops(model: Graphormer) -> Transform:
        shape = (model.num_edge_dis, model.num_heads, model.num_heads)
        return reshape(shape, (-1, 1))

    return Rules(
        (
            Rule(f"{features}atom_encoder.weight", "node_embedding"),
            Rule(f"{features}in_degree_encoder.weight", "in_degree_embedding"),
            Rule(f"{features}out_degree_encoder.weight", "out_degree_embedding"),
            Rule(f"{features}graph_token.weight", "graph_token"),
            Rule(f"{bias}edge_encoder.weight", "bias/edge_embedding"),
            Rule(f"{bias}edge_dis_encoder.weight", "bias/hop_kernel", hops),
            Rule(f"{bias}spatial_pos_encoder.weight", "bias/distance_embedding"),
            Rule(
                f"{bias}graph_token_virtual_distance.weight", "bias/graph_token_distance_embedding"
            ),
            *norm_rules(f"{graph}emb_layer_norm", "embed_norm"),
            *attention,
            *norm_rules(f"{theirs}.self_attn_layer_norm", f"{ours}/norm1"),
            *dense_rules(f"{theirs}.fc1", f"{ours}/mlp/up"),
            *dense_rules(f"{theirs}.fc2", f"{ours}/mlp/down"),
            *norm_rules(f"{theirs}.final_layer_norm", f"{ours}/norm2"),
            Rule(f"{graph}final_layer_norm.weight", "unused_norm_scale"),
            Rule(f"{graph}final_layer_norm.bias", "unused_norm_bias"),
            Rule(f"{prefix}masked_lm_pooler.weight", "unused_pooler_kernel", linear),
            Rule(f"{prefix}masked_lm_pooler.bias", "unused_pooler_bias"),
            *dense_rules(f"{prefix}lm_head_transform_weight", "transform"),
            *norm_rules(f"{prefix}layer_norm", "norm"),
            Rule(f"{head}.weight", "head/kernel", linear),
            Rule(f"{shift}lm_output_learned_bias", "head_bias"),
        ),
        fresh=("head/kernel", "head_bias"),
    )


LAYOUTS = {
    "official": _rules(),
    "huggingface": _rules("classifier.classifier", "classifier."),  # it has no pooler
}

_COMMON = dict(
    module=Graphormer,
    task="graph_regression",
    paper="Do Transformers Really Perform Bad for Graph Representation?, arXiv 2106.05234",
    code="github.com/microsoft/Graphormer",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "graphormer_slim": Variant(
        fields=dict(embed_dim=80, mlp_dim=80, num_heads=8), params=959_073, **_COMMON
    ),
    "graphormer_base": Variant(fields={}, params=48_268_097, **_COMMON),
    "graphormer_large": Variant(
        fields=dict(depth=24, embed_dim=1024, mlp_dim=1024), **_COMMON
    ),
    "graphormer_test": Variant(
        fields=dict(num_nodes=64, num_in_degree=8, num_out_degree=8, num_edges=16, num_spatial=16,
                    num_edge_dis=4, max_hops=3, depth=2, embed_dim=32, mlp_dim=32, num_heads=4,
                    max_nodes=6, node_features=2, edge_features=2, num_classes=2),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    frozen=("unused_.*",),
    no_decay=("graph_token",),
    partition={r"bias/.*": (("distance", "bias_heads"), ("hops", "bias_heads", "bias_heads"))},
)
