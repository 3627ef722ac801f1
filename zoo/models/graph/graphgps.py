"""GraphGPS: message passing along edges and attention between all nodes, side by side.

Rampasek et al., "Recipe for a General, Powerful, Scalable Graph Transformer", NeurIPS 2022, arXiv
2205.12454; official code github.com/rampasek/GraphGPS (MIT), whose names we follow.

    x_i = [E(type_i) | W BN(p_i)]                      p: chances that a random walk is back after k
          or [E(type_i) | sum_k MLP(v_ki, lambda_k)]   eigenvectors of the Laplacian, or all three;
                                                       in their place also SignNet
    local   = BN(x + messages(x, e));   global = BN(x + attention(x))
    s = local + global;   x = BN(s + W2 relu(W1 s))    W1 twice as wide; `depth` times
    messages of GINE       MLP(x_i + sum_j relu(x_j + e_ij))
    messages of gated GCN  see `GatedMessages`, which also changes e
    logits = MLP(sum or mean of x_i)                   widths halve twice

Isotropic messages of GIN leave the edges out; the other kinds are in `zoo.layers.messages`, the
positions in `zoo.layers.graph_positions`, the bias by paths in `zoo.layers.graph_bias`. Norms
are over the real nodes of a batch. Attention is that of softmax, of Performer's random features or
of BigBird's blocks. With the latter two a graph's outputs depend on the size to which it is padded,
as in the official code: padding has a part in what Performer divides by, and BigBird draws blocks
by their number.

    features            graphgps_zinc
    embed               12  64    for 12 nodes
    layer0              12  64    up to layer9
    pooled              64
    logits              1
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules, linear
from zoo.layers.attention import Attention
from zoo.layers.bigbird import BigBirdLayer, bigbird_rules
from zoo.layers.dense import Dense
from zoo.layers.graph import (
    ATOM_NUMBERS,
    BOND_NUMBERS,
    GraphLayerNorm,
    NodeBatchNorm,
    NoNorm,
    SumOfEmbeddings,
    real_nodes,
)
from zoo.layers.graph_bias import DegreeEmbedding, PathBias, bias_rules
from zoo.layers.graph_positions import (
    MAX_LAYERS,
    EigenPositions,
    SignPositions,
    eigen_rules,
    sign_derived,
    sign_rules,
)
from zoo.layers.messages import (
    AttentiveMessages,
    ConvolvedMessages,
    GatedMessages,
    IsotropicMessages,
    PrincipalMessages,
    SoftmaxMessages,
    message_rules,
)
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.models.language.performer import PerformerAttention
from zoo.system import System, Variant

NORMS = {"batch": NodeBatchNorm, "graph": GraphLayerNorm, "none": NoNorm}


MESSAGES = {
    "gine": lambda layer: partial(IsotropicMessages, True, layer.activation),
    "gin": lambda layer: partial(IsotropicMessages, False, layer.activation),
    "gcn": lambda layer: ConvolvedMessages,
    "gat": lambda layer: partial(AttentiveMessages, layer.num_heads),
    "gen": lambda layer: SoftmaxMessages,
    "pna": lambda layer: PrincipalMessages,
    "gated": lambda layer: partial(GatedMessages, layer.dropout, True, layer.activation),
}
"""The kinds of messages, each a function of the layer that they are in."""
PERFORMER_DIM = 64  # of a head of Performer's attention, whatever the channels


class GPSLayer(nn.Module):
    """Messages and attention from the same nodes, summed; then an MLP.

    Attributes:
      local: kind of messages, or none.
      attention: kind of attention, or none.
      num_heads: of it.
      activation: of the MLP, and of that of the messages.
      dropout: rate behind each branch.
      attention_dropout: rate on attention weights.
      norm: kind of the norms behind the branches and the MLP (`NORMS`).
      bigbird: other attributes of BigBird's layer than its heads and dropout.
    """

    local: str
    attention: str
    num_heads: int
    activation: str = "relu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm: str = "batch"
    bigbird: Mapping[str, Any] = FrozenDict()
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
        bias: Float[Array, "batch heads nodes nodes"] | None = None,
    ) -> tuple[Float[Array, "batch nodes channels"], Float[Array, "batch edges channels"]]:
        """The nodes and the edges after the layer.

        `place` is for the gate of messages by distance, `bias` for `biased` attention.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = partial(NORMS[self.norm], **types)
        ways = []
        if self.local != "none":
            messages = MESSAGES[self.local](self)(name="local", **types)
            more = {} if place is None else {"place": place}
            y = messages(x, edge, source, target, real, train, **more)
            if self.local == "gated":  # it has added what it got, and dropped out, by itself
                y, edge = y
            else:
                y = x + drop(y)
            ways.append(norm(name="norm_local")(y, real, train))
        elif self.attention == "none":
            raise ValueError("A layer needs messages, attention or both; set local or attention.")
        if self.attention != "none":
            y = x + drop(self._attention(types, bias)(x, real, train))
            ways.append(norm(name="norm_attention")(y, real, train))
        for way, kind in (("local", self.local), ("attention", self.attention)):
            if kind == "none":  # official files have this norm, which nothing uses
                norm(name=f"unused_norm_{way}")(x, real)
        x = sum(ways)
        activation = ACTIVATIONS[self.activation]
        mlp = Mlp(2 * x.shape[-1], activation, self.dropout, name="mlp", **types)
        x = norm(name="norm2")(x + mlp(x, train), real, train)
        return constrain(x, "batch", "length", "channels"), edge

    def _attention(self, types: dict, bias: Array | None) -> Callable[[Array, Array, bool], Array]:
        """Between the real nodes of a graph."""
        if self.attention == "bigbird":
            return BigBirdLayer(
                self.num_heads,
                **self.bigbird,
                dropout=self.dropout,
                name="sparse_attention",
                **types,
            )
        if self.attention in ("softmax", "biased"):
            init = nn.initializers.xavier_uniform()
            attention = Attention(
                self.num_heads,
                attention_dropout=self.attention_dropout,
                kernel_init=init,
                name="attention",
                **types,
            )
            return partial(attention, bias=bias if self.attention == "biased" else None)
        attention = PerformerAttention(
            self.num_heads,
            PERFORMER_DIM,
            int(PERFORMER_DIM * math.log(PERFORMER_DIM)),
            rotary=False,
            out_bias=True,
            attention_dropout=self.attention_dropout,
            name="linear_attention",
            **types,
        )
        return lambda x, real, train: attention(x, {"visible": real}, train)


class GraphGPS(Model):
    """GraphGPS for graphs of any size, padded to one.

    Attributes:
      node_numbers: values of each feature of a node.
      edge_numbers: values of each feature of an edge.
      walk_steps: steps of the random walks; 0: no positions.
      position_dim: channels of the positions.
      position_norm: whether they are normalised over the batch.
      position_layers: layers of the MLP that embeds them; 0: a linear map.
      eigenvectors: of the Laplacian that nodes have positions in; 0: none.
      eigen_dim: channels of these.
      eigen_layers: layers of their MLP, or transformer.
      eigen_heads: of that transformer; 0: an MLP.
      eigen_norm: whether they are normalised over the batch.
      eigen_post_layers: layers of an MLP behind the sum over eigenvectors.
      eigen_stable: eigenvectors are no positions of the nodes, but say by their distance along an
        edge how much a message of `gated` counts (the official GINE of that kind cannot be built).
      sign_layers: layers of SignNet's graph network, which reads eigenvectors in place of that MLP;
        0: none.
      sign_width: channels inside it.
      sign_out: channels that it gives for each eigenvector.
      sign_post_layers: layers of the MLP behind it.
      path_steps: edges of the paths that attention is biased by, and the number for nodes that no
        path joins; 0: no such bias.
      degree_numbers: rows of the tables of how many edges come into a node and go out of it, which
        are added where there are `path_steps`.
      sign_sum: whether that reads the sum over eigenvectors ("DeepSet"), or all of them ("MLP").
      degrees: how many nodes of the training set have 0, 1, 2, ... edges into them; official files
        of `pna` hold its mean, and nothing else depends on it.
      embed_dim: channels.
      depth: layers.
      num_heads: heads.
      local: kind of messages: `gine`, `gin` and `gcn` (without edges), `gated`, `gat`, `gen`
        (GENConv), `pna`, or `none`.
      attention: between all nodes, beside the messages: `softmax`, `biased` (softmax with a bias),
        `performer`, `bigbird`, or `none`.
      block_size: nodes of a block of BigBird.
      random_blocks: that it draws for each block.
      bigbird_bias: whether its queries, keys and values have biases.
      bigbird_activation: of its MLP.
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
    position_norm: bool = True
    position_layers: int = 0
    eigenvectors: int = 0
    eigen_dim: int = 8
    eigen_layers: int = 2
    eigen_heads: int = 0
    eigen_norm: bool = False
    eigen_post_layers: int = 0
    eigen_stable: bool = False
    path_steps: int = 0
    degree_numbers: tuple[int, int] = (64, 64)
    sign_layers: int = 0
    sign_width: int = 64
    sign_out: int = 64
    sign_post_layers: int = 3
    sign_sum: bool = True
    degrees: tuple[int, ...] = ()
    embed_dim: int = 64
    depth: int = 10
    num_heads: int = 4
    local: Literal["gine", "gin", "gcn", "gated", "gat", "gen", "pna", "none"] = "gine"
    attention: Literal["softmax", "biased", "performer", "bigbird", "none"] = "softmax"
    block_size: int = 3
    random_blocks: int = 3
    bigbird_bias: bool = False
    bigbird_activation: str = "relu"
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
        real = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        inputs = {
            "nodes": whole((batch_size, self.max_nodes, len(self.node_numbers))),
            "edges": whole((batch_size, self.max_edges, 2)),
            "edge_features": whole((batch_size, self.max_edges, len(self.edge_numbers))),
            "num_nodes": whole((batch_size,)),
            "walks": real((batch_size, self.max_nodes, self.walk_steps)),
        }
        if self.eigenvectors:
            inputs["eigen"] = real((batch_size, self.max_nodes, self.eigenvectors, 2))
        if self.path_steps:
            pairs = (batch_size, self.max_nodes, self.max_nodes)
            inputs |= {"hops": whole(pairs), "paths": whole((*pairs, self.path_steps))}
        elif self.attention == "biased":
            shape = (batch_size, self.num_heads, self.max_nodes, self.max_nodes)
            inputs["bias"] = real(shape)
        return inputs

    def __call__(
        self,
        nodes: Int[Array, "batch nodes features"],
        edges: Int[Array, "batch edges 2"],
        edge_features: Int[Array, "batch edges edge_features"],
        num_nodes: Int[Array, "batch"],
        walks: Float[Array, "batch nodes steps"],
        eigen: Float[Array, "batch nodes wanted 2"] | None = None,
        hops: Int[Array, "batch nodes nodes"] | None = None,
        paths: Int[Array, "batch nodes nodes steps"] | None = None,
        bias: Float[Array, "batch heads nodes nodes"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """The outputs of each graph."""
        inputs = (nodes, edges, edge_features, num_nodes, walks, eigen, hops, paths, bias)
        return self.features(*inputs, train)["logits"]

    @nn.compact
    def features(
        self,
        nodes: Int[Array, "batch nodes features"],
        edges: Int[Array, "batch edges 2"],
        edge_features: Int[Array, "batch edges edge_features"],
        num_nodes: Int[Array, "batch"],
        walks: Float[Array, "batch nodes steps"],
        eigen: Float[Array, "batch nodes wanted 2"] | None = None,
        hops: Int[Array, "batch nodes nodes"] | None = None,
        paths: Int[Array, "batch nodes nodes steps"] | None = None,
        bias: Float[Array, "batch heads nodes nodes"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Args:
          nodes: numbers of the features of each node.
          edges: source and target of each edge; of padding, a target past the last node.
          edge_features: numbers of the features of each edge.
          num_nodes: how many nodes of each graph are real.
          walks: of each node (`zoo.layers.graph_positions.return_chances`).
          eigen: of each node (`laplacian_eigenvectors` there), where the model has `eigenvectors`.
          hops: between all nodes, and
          paths: types of the edges in between (`zoo.layers.graph_bias.hops_and_paths`), where the
            model has `path_steps`.
          bias: of `biased` attention, where it is not made of paths.
          train: whether to drop out and to normalise by the batch.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        real = real_nodes(num_nodes, nodes.shape[1])
        source, target = edges[..., 0], edges[..., 1]
        width = self.embed_dim - (self.position_dim if self.walk_steps else 0)
        joined = self.eigenvectors and not self.eigen_stable
        width = width - (self.eigen_dim if joined else 0)
        place = None
        x = SumOfEmbeddings(self.node_numbers, width, name="embed_node", **types)(nodes)
        if self.path_steps:
            if hops is None or paths is None or paths.shape[3] != self.path_steps:
                raise ValueError(
                    f"This GraphGPS takes hops and paths of {self.path_steps} steps; make them "
                    "with hops_and_paths."
                )
            edge_types = self.edge_numbers[0]
            bias_of = PathBias(self.num_heads, self.path_steps, edge_types, self.param_dtype,
                               name="path_bias")  # fmt: skip
            bias = bias_of(hops, paths)
            degrees = DegreeEmbedding(self.degree_numbers, width, name="embed_degree", **types)
            x = x + degrees(source, target, real)
        elif self.attention == "biased" and bias is None:
            raise ValueError("Biased attention needs a bias; set path_steps, or give one.")
        if self.eigenvectors:
            if eigen is None or eigen.shape[2] != self.eigenvectors:
                shape = None if eigen is None else eigen.shape
                raise ValueError(
                    f"This GraphGPS takes eigen of shape (batch, nodes, {self.eigenvectors}, 2), "
                    f"not {shape}; make it with laplacian_eigenvectors."
                )
            if self.eigen_stable:
                if self.local != "gated":
                    raise ValueError(
                        f"eigen_stable is for messages of gated, not of {self.local}; set local."
                    )
                place = jnp.where(real[..., None] & ~jnp.isnan(eigen[..., 0]), eigen[..., 0], 0)
                if self.eigen_norm:
                    place = NodeBatchNorm(name="norm_stable", **types)(place, real, train)
                place = Dense(self.embed_dim, name="embed_stable", **types)(place)
            elif self.sign_layers:
                sizes = (self.eigen_dim, self.sign_layers, self.sign_width, self.sign_out,
                         self.sign_post_layers, self.sign_sum)  # fmt: skip
                signs = SignPositions(*sizes, name="embed_sign", **types)
                x = jnp.concatenate([x, signs(eigen[..., 0], source, target, real, train)], -1)
            else:
                sizes = (self.eigen_dim, self.eigen_layers, self.eigen_heads, self.eigen_norm,
                         self.eigen_post_layers)  # fmt: skip
                positions = EigenPositions(*sizes, name="embed_eigen", **types)
                x = jnp.concatenate([x, positions(eigen, real, train)], -1)
        if self.walk_steps:
            x = jnp.concatenate([x, self._positions(walks, real, train)], -1)
        x = jnp.where(real[..., None], x, 0)
        width = min(128, self.embed_dim) if self.local == "pna" else self.embed_dim
        embed = SumOfEmbeddings(self.edge_numbers, width, name="embed_edge", **types)
        edge = embed(edge_features)
        out = {"embed": x}
        bigbird = {
            "block_size": self.block_size,
            "random_blocks": self.random_blocks,
            "qkv_bias": self.bigbird_bias,
            "activation": self.bigbird_activation,
        }
        for i in range(self.depth):
            layer = GPSLayer(
                self.local,
                self.attention,
                self.num_heads,
                self.activation,
                self.dropout,
                self.attention_dropout,
                self.norm,
                bigbird,
                name=f"layers_{i}",
                **types,
            )
            x, edge = layer(x, edge, source, target, real, train, place, bias)
            out[f"layer{i}"] = x
        y = out["pooled"] = pooled(x, real, self.pool)
        for i in range(self.head_layers):
            y = Dense(self.embed_dim // 2 ** (i + 1), name=f"head_{i}", **types)(y)
            y = ACTIVATIONS[self.activation](y)
        last = Dense(self.num_classes, name=f"head_{self.head_layers}", **types)
        return out | {"logits": last(y)}

    def _positions(
        self,
        walks: Float[Array, "batch nodes steps"],
        real: Bool[Array, "batch nodes"],
        train: bool,
    ) -> Float[Array, "batch nodes channels"]:
        """What is made of the chances of return."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = walks
        if self.position_norm:
            x = NodeBatchNorm(name="norm_position", **types)(x, real, train)
        if not self.position_layers:
            return Dense(self.position_dim, name="embed_position", **types)(x)
        for i in range(self.position_layers):
            last = i == self.position_layers - 1
            width = self.position_dim * (1 if last else 2)
            x = nn.relu(Dense(width, name=f"embed_position_{i}", **types)(x))
        return x


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


def _rules(prefix: str = "", atoms: bool = False, eigen: bool = False) -> Rules:
    """Of one naming.

    Args:
      prefix: of all names.
      atoms: with the tables of OGB's encoders of atoms and bonds, else with one of types.
      eigen: with positions in eigenvectors, which come before those of walks.
    """
    theirs, ours = f"{prefix}layers.{{i}}", "layers_{i}"
    node, edge = f"{prefix}encoder.node_encoder.encoder", f"{prefix}encoder.edge_encoder."
    walks = f"{node}3" if eigen else f"{node}2"
    norms = (
        ("norm1_local", "norm_local"),
        ("norm1_attn", "norm_attention"),
        ("norm1_local", "unused_norm_local"),
        ("norm1_attn", "unused_norm_attention"),
        ("norm2", "norm2"),
        ("local_model.bn_node_x", "local/norm_node"),
        ("local_model.bn_edge_e", "local/norm_edge"),
        ("local_model.mlp.1", "local/norm"),
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
        *batch_norm_rules(f"{walks}.raw_norm", "norm_position"),
        *dense_rules(f"{walks}.pe_encoder", "embed_position"),
        *(
            rule
            for i in range(MAX_LAYERS)
            for rule in dense_rules(f"{walks}.pe_encoder.{2 * i}", f"embed_position_{i}")
        ),
        *(rule for a, b in norms for rule in batch_norm_rules(f"{theirs}.{a}", f"{ours}/{b}")),
        *message_rules(f"{theirs}.local_model", f"{ours}/local"),
        Rule(f"{theirs}.self_attn.in_proj_weight", f"{ours}/attention/qkv/kernel", linear),
        Rule(f"{theirs}.self_attn.in_proj_bias", f"{ours}/attention/qkv/bias"),
        *dense_rules(f"{theirs}.self_attn.out_proj", f"{ours}/attention/out"),
        *(
            rule
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
            for rule in dense_rules(
                f"{theirs}.self_attn.to_{short}", f"{ours}/linear_attention/{name}"
            )
        ),
        Rule(
            f"{theirs}.self_attn.fast_attention.projection_matrix",
            f"batch_stats/{ours}/linear_attention/features",
        ),
        *bigbird_rules(f"{theirs}.self_attn.encoder.layers.0", f"{ours}/sparse_attention"),
        *dense_rules(f"{theirs}.ff_linear1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.ff_linear2", f"{ours}/mlp/down"),
    ]
    if eigen:
        rules += eigen_rules(f"{node}2", "embed_eigen")
        rules += sign_rules(f"{node}2", "embed_sign")
        rules += batch_norm_rules(f"{node}2.raw_norm", "norm_stable")
        rules += dense_rules(f"{node}2.linear_encoder_eigenvec", "embed_stable")
        rules += bias_rules(f"{node}2", "path_bias", "embed_degree")
    derived = {
        **{
            f"{theirs}.{name}.num_batches_tracked": partial(_layer_counter, name)
            for name, _ in norms
        },
        f"{walks}.raw_norm.num_batches_tracked": _counter,
        f"{theirs}.local_model.eps": _epsilon,
        **{
            f"{theirs}.local_model.aggr_module.avg_deg_{kind}": partial(_degree, kind)
            for kind in ("lin", "log")
        },
    }
    if eigen:
        derived |= {f"{node}2.raw_norm.num_batches_tracked": _eigen_counter}
        derived |= sign_derived(f"{node}2")
    head = f"{prefix}post_mp.FC_layers"
    return Rules(
        (*rules, *dense_rules(f"{head}.{{i}}", "head_{i}")),
        derived=derived,
        fresh=("head_*/*",),
    )


def _counter(model: GraphGPS) -> np.ndarray | None:
    return np.zeros((), np.int64) if model.walk_steps and model.position_norm else None


def _eigen_counter(model: GraphGPS) -> np.ndarray | None:
    there = model.eigenvectors and model.eigen_norm and not model.sign_layers
    return np.zeros((), np.int64) if there else None


def _layer_counter(name: str, model: GraphGPS, i: int) -> np.ndarray | None:
    """Of the batches that a norm of a layer has seen, where the layer has it."""
    kind = {"local_model.bn_node_x": "gated", "local_model.bn_edge_e": "gated",
            "local_model.mlp.1": "gen"}.get(name)  # fmt: skip
    there = model.local == kind if kind else model.norm == "batch"
    return np.zeros((), np.int64) if there else None


def _degree(kind: str, model: GraphGPS, i: int) -> np.ndarray | None:
    """The mean over nodes of how many edges end there, or of the logarithm of that plus 1."""
    if model.local != "pna":
        return None
    counts = np.array(model.degrees or (1,), np.float64)
    degree = np.arange(len(counts))
    value = degree if kind == "lin" else np.log(degree + 1)
    return np.array([(counts * value).sum() / counts.sum()], np.float32)


def _epsilon(model: GraphGPS, i: int) -> np.ndarray | None:
    """GINE's epsilon, which is fixed at 0."""
    return np.zeros(1, np.float32) if model.local in ("gine", "gin") and i < model.depth else None


LAYOUTS = {
    f"{shell}{'atoms' if atoms else 'types'}{'_eigen' if eigen else ''}": _rules(
        prefix, atoms, eigen
    )
    for eigen in (False, True)
    for shell, prefix in (("", ""), ("graphgym_", "model."))
    for atoms in (False, True)
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

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, frozen=(".*unused_norm_.*",))
