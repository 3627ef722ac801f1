"""The graph transformer that GTSP prunes: GPS layers on plain features of nodes, without edges.

Liu et al., "Exploring Sparsity in Graph Transformers", arXiv 2312.05479; official code
github.com/LiuChuang0059/GTSP (no licence), whose `gps_base` is this network and whose other folders
prune it (`zoo.methods.gtsp`).

    x_i = W f_i + W_p p_i                   f: features, p: chances that a random walk is back
    x = a GPS layer with GIN messages and attention (`zoo.models.graph.graphgps`)     `depth` times
    logits = W sum_i x_i

The table of edge types is in the published files and is never read.

    features            gps_nci1
    embed               30  64    for 30 nodes
    layer0              30  64    up to layer3
    pooled              64
    logits              2
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules, linear
from zoo.layers.dense import Dense
from zoo.layers.graph import real_nodes
from zoo.layers.model import Model
from zoo.models.graph.graphgps import GPSLayer, pooled
from zoo.system import System, Variant


class GPS(Model):
    """GPS layers for graphs of any size, padded to one.

    Attributes:
      node_features: real numbers of a node.
      walk_steps: steps of the random walks.
      embed_dim: channels.
      depth: layers.
      num_heads: of attention.
      edge_types: rows of the table that nothing reads; 0: there is none.
      num_classes: outputs.
      max_nodes, max_edges: of `example_inputs`.
      dropout: rate behind each branch.
      attention_dropout: rate on attention weights.
    """

    node_features: int = 37
    walk_steps: int = 20
    embed_dim: int = 64
    depth: int = 4
    num_heads: int = 4
    edge_types: int = 4
    num_classes: int = 2
    max_nodes: int = 30
    max_edges: int = 64
    dropout: float = 0.0
    attention_dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        of_nodes = (batch_size, self.max_nodes)
        return {
            "nodes": jax.ShapeDtypeStruct((*of_nodes, self.node_features), jnp.float32),
            "edges": jax.ShapeDtypeStruct((batch_size, self.max_edges, 2), jnp.int32),
            "num_nodes": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            "walks": jax.ShapeDtypeStruct((*of_nodes, self.walk_steps), jnp.float32),
        }

    def __call__(
        self,
        nodes: Float[Array, "batch nodes features"],
        edges: Int[Array, "batch edges 2"],
        num_nodes: Int[Array, "batch"],
        walks: Float[Array, "batch nodes steps"],
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """The outputs of each graph."""
        return self.features(nodes, edges, num_nodes, walks, train)["logits"]

    @nn.compact
    def features(
        self,
        nodes: Float[Array, "batch nodes features"],
        edges: Int[Array, "batch edges 2"],
        num_nodes: Int[Array, "batch"],
        walks: Float[Array, "batch nodes steps"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Args:
          nodes: features of each node.
          edges: source and target of each edge; of padding, a target past the last node.
          num_nodes: how many nodes of each graph are real.
          walks: of each node (`zoo.layers.graph_positions.return_chances`).
          train: whether to drop out and to normalise by the batch.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        real = real_nodes(num_nodes, nodes.shape[1])
        x = Dense(self.embed_dim, name="embed_node", **types)(nodes)
        x = x + Dense(self.embed_dim, name="embed_position", **types)(walks)
        x = jnp.where(real[..., None], x, 0)
        if self.edge_types:
            shape = (self.edge_types, self.embed_dim)
            normal = nn.initializers.normal(1.0)
            self.param("unused_edge_embedding", normal, shape, self.param_dtype)
        out = {"embed": x}
        edge = jnp.zeros((*edges.shape[:2], 0), x.dtype)
        for i in range(self.depth):
            layer = GPSLayer(
                "gin", "softmax", self.num_heads, "relu", self.dropout, self.attention_dropout,
                name=f"layers_{i}", **types,
            )  # fmt: skip
            x, _ = layer(x, edge, edges[..., 0], edges[..., 1], real, train)
            out[f"layer{i}"] = x
        y = out["pooled"] = pooled(x, real, "add")
        return out | {"logits": Dense(self.num_classes, name="head", **types)(y)}


# ---------------------------------------------------------------------------- checkpoints


def _rules() -> Rules:
    theirs, ours = "convs.{i}", "layers_{i}"
    norms = (("norm1", "norm_local"), ("norm2", "norm_attention"), ("norm3", "norm2"))
    maps = (
        (f"{theirs}.conv.nn.0", f"{ours}/local/mlp/up"),
        (f"{theirs}.conv.nn.2", f"{ours}/local/mlp/down"),
        (f"{theirs}.attn.out_proj", f"{ours}/attention/out"),
        (f"{theirs}.mlp.0", f"{ours}/mlp/up"),
        (f"{theirs}.mlp.3", f"{ours}/mlp/down"),
        (f"{theirs}.gumbel", f"{ours}/attention/token_score"),  # zoo.methods.gtsp.SparseTokens
        ("node_emb", "embed_node"),
        ("pe_lin", "embed_position"),
        ("lin", "head"),
    )
    return Rules(
        [
            Rule("edge_emb.weight", "unused_edge_embedding"),
            *(rule for a, b in maps for rule in dense_rules(a, b)),
            Rule(f"{theirs}.attn.in_proj_weight", f"{ours}/attention/qkv/kernel", linear),
            Rule(f"{theirs}.attn.in_proj_bias", f"{ours}/attention/qkv/bias"),
            *(
                rule
                for a, b in norms
                for rule in batch_norm_rules(f"{theirs}.{a}.module", f"{ours}/{b}")
            ),
        ],
        derived={
            f"{theirs}.conv.eps": _epsilon,
            **{f"{theirs}.{name}.module.num_batches_tracked": _counter for name, _ in norms},
        },
        fresh=("head/*",),
    )


def _epsilon(model: nn.Module, i: int) -> np.ndarray | None:
    """GIN's epsilon, which is fixed at 0."""
    return np.zeros(1, np.float32) if i < model.depth else None


def _counter(model: nn.Module, i: int) -> np.ndarray | None:
    return np.zeros((), np.int64) if i < model.depth else None


LAYOUTS = {"official": _rules()}

_COMMON = dict(
    module=GPS,
    task="graph_classification",
    paper="Exploring Sparsity in Graph Transformers, arXiv 2312.05479",
    code="github.com/LiuChuang0059/GTSP",
    licence="none stated",
)

VARIANTS: dict[str, Variant] = {
    "gps_nci1": Variant(fields={}, **_COMMON),
    "gps_test": Variant(
        fields=dict(node_features=5, walk_steps=4, embed_dim=32, depth=2, max_nodes=8,
                    max_edges=12, attention_dropout=0.0),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, frozen=("unused_.*",))
