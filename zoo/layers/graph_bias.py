"""What the structure of a graph adds to scores and nodes, as GraphGPS has it after Graphormer.

    bias_ij = E_distance(hops_ij) + 1 / max(hops_ij, 1) sum_k W_k E_edge(type of edge k on the path)
    x_i = x_i + E_in(edges into i) + E_out(edges out of i)

Ying et al., "Do Transformers Really Perform Bad for Graph Representation?", NeurIPS 2021, arXiv
2106.05234; code github.com/rampasek/GraphGPS (MIT). Other than in `zoo.models.graph.graphormer`,
distances begin at 0, and a step that a path does not have counts as an edge of type 0.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Transform, reshape
from zoo.layers.graph import sum_at_nodes

init = nn.initializers.normal(0.02)


def hops_and_paths(
    edges: Int[np.ndarray, "2 edges"], types: Int[np.ndarray, "edges"], count: int, steps: int
) -> tuple[Int[np.ndarray, "nodes nodes"], Int[np.ndarray, "nodes nodes steps"]]:
    """Hops between all nodes, and the types of the edges on a shortest path.

    Args:
      edges: source and target of each edge.
      types: of each edge.
      count: of nodes.
      steps: number for nodes that no path joins; longer paths are cut to `steps - 1` hops.
    """
    after = [[] for _ in range(count)]
    type_of = {}
    for source, target, kind in zip(*edges.tolist(), types.tolist(), strict=True):
        after[source].append(target)
        type_of[source, target] = kind
    hops = np.full((count, count), steps, np.int32)
    paths = np.zeros((count, count, steps), np.int32)
    for start in range(count):
        found = {start: []}
        reached = [start]
        for node in reached:  # it grows: breadth first
            for other in after[node]:
                if other not in found:
                    found[other] = [*found[node], type_of[node, other]]
                    reached.append(other)
        for end, path in found.items():
            path = path[: steps - 1]
            hops[start, end] = len(path)
            paths[start, end, : len(path)] = path
    return hops, paths


class PathBias(nn.Module):
    """The bias of each head on the scores between all nodes.

    Attributes:
      num_heads: heads.
      steps: of a path that have a matrix; as a distance it stands for no path.
      edge_types: of the edges on paths.
    """

    num_heads: int
    steps: int
    edge_types: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, hops: Int[Array, "batch nodes nodes"], paths: Int[Array, "batch nodes nodes steps"]
    ) -> Float[Array, "batch heads nodes nodes"]:
        """The bias; between padding it means nothing."""
        heads = self.num_heads

        def parameter(name: str, *shape: int) -> Array:
            return self.param(name, init, shape, self.param_dtype)

        bias = parameter("distance_embedding", self.steps + 1, heads)[hops]
        matrices = parameter("hop_kernel", self.steps, heads, heads)
        of_edges = parameter("edge_embedding", self.edge_types, heads)[paths]
        of_edges = jnp.einsum("bijkn,knm->bijm", of_edges, matrices)
        return jnp.moveaxis(bias + of_edges / jnp.maximum(hops, 1)[..., None], -1, 1)


class DegreeEmbedding(nn.Module):
    """The sum of a row for the edges into a node and one for those out of it.

    Attributes:
      sizes: rows of both tables; a node of as many edges or more gets the last.
      channels: width.
    """

    sizes: tuple[int, int]
    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        source: Int[Array, "batch edges"],
        target: Int[Array, "batch edges"],
        real: Bool[Array, "batch nodes"],
    ) -> Float[Array, "batch nodes channels"]:
        """Of each node."""
        count = real.shape[1]
        ones = (target < count)[..., None].astype(jnp.int32)
        x = 0.0
        for name, ends, size in zip(("in", "out"), (target, source), self.sizes, strict=True):
            degree = jnp.minimum(sum_at_nodes(ones, ends, count)[..., 0], size - 1)
            shape = (size, self.channels)
            table = self.param(f"{name}_degree_embedding", init, shape, self.param_dtype)
            x = x + table.astype(self.dtype)[degree]
        return x


def bias_rules(theirs: str, bias: str, degrees: str) -> list[Rule]:
    """Of the encoders of GraphGPS called GraphormerBias: of a `PathBias` and `DegreeEmbedding`."""

    def matrices(model: nn.Module) -> Transform:
        return reshape((model.path_steps, model.num_heads, model.num_heads), (-1, 1))

    return [
        Rule(f"{theirs}.0.spatial_encoder.weight", f"{bias}/distance_embedding"),
        Rule(f"{theirs}.0.edge_dis_encoder.weight", f"{bias}/hop_kernel", matrices),
        Rule(f"{theirs}.0.edge_encoder.weight", f"{bias}/edge_embedding"),
        *(
            Rule(f"{theirs}.1.{way}_degree_encoder.weight", f"{degrees}/{way}_degree_embedding")
            for way in ("in", "out")
        ),
    ]
