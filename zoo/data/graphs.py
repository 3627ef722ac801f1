"""Graphs as arrays: distances, edges on shortest paths, and batches padded to one size.

Graphormer's preprocessing is that of github.com/microsoft/Graphormer (`algos.pyx`, `wrapper.py`,
`collator.py`): distances by Floyd and Warshall, whose choice among paths of one length depends on
the order of its loops (the node in between is outermost, and only a shorter path replaces another).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

UNREACHABLE = 510
OFFSET = 512  # numbers of one feature column


@dataclass(frozen=True)
class Graph:
    """A graph with numbers for features.

    Attributes:
      nodes: features of each node.
      edges: from and to; an undirected edge stands in both directions.
      edge_features: of each edge.
    """

    nodes: Int[np.ndarray, "nodes features"]
    edges: Int[np.ndarray, "2 edges"]
    edge_features: Int[np.ndarray, "edges features"]


def shortest_paths(
    adjacency: Int[np.ndarray, "nodes nodes"],
) -> tuple[Int[np.ndarray, "nodes nodes"], Int[np.ndarray, "nodes nodes"]]:
    """Hops between all nodes (510: no path), and the node in between (-1: none)."""
    count = len(adjacency)
    hops = np.where(adjacency > 0, 1, UNREACHABLE)
    np.fill_diagonal(hops, 0)
    between = np.full((count, count), -1)
    for k in range(count):
        through = hops[:, k, None] + hops[None, k]
        shorter = through < hops
        hops, between = np.where(shorter, through, hops), np.where(shorter, k, between)
    return np.minimum(hops, UNREACHABLE), between


def path_between(between: Int[np.ndarray, "nodes nodes"], start: int, end: int) -> list[int]:
    """The nodes of the shortest path, both ends included."""
    k = int(between[start, end])
    if k == -1:
        return [start, end]
    return path_between(between, start, k)[:-1] + path_between(between, k, end)


def numbered(features: Int[np.ndarray, "rows columns"]) -> Int[np.ndarray, "rows columns"]:
    """Numbers that are of one table for all columns: 1 + 512 for each column before."""
    features = features if features.ndim > 1 else features[:, None]
    return features + 1 + OFFSET * np.arange(features.shape[1])


def graphormer_inputs(
    graphs: Sequence[Graph],
    max_hops: int = 5,
    multi_hop: bool = True,
    max_nodes: int | None = None,
) -> dict[str, np.ndarray]:
    """What `zoo.models.graph.graphormer` takes of a batch, padded to the largest graph.

    Args:
      graphs: at least one.
      max_hops: edges of a path that are given; 0: all.
      multi_hop: give the edges along paths, else the direct edges.
      max_nodes: pad to as many nodes instead.

    Raises:
      ValueError: if a graph has more nodes than `max_nodes`.
    """
    size = max(len(graph.nodes) for graph in graphs)
    if max_nodes is not None:
        if size > max_nodes:
            raise ValueError(
                f"A graph has {size} nodes, and max_nodes={max_nodes}; raise it or leave it out."
            )
        size = max_nodes
    found = [_of_graph(graph, max_hops) for graph in graphs]
    steps = max(paths.shape[2] for *_, paths in found)
    batch = {"nodes": [], "degree": [], "distance": [], "edges": []}
    for nodes, degree, hops, direct, paths in found:
        missing = size - len(nodes)
        more = (0, missing)
        batch["nodes"].append(np.pad(nodes + 1, (more, (0, 0))))
        batch["degree"].append(np.pad(degree + 1, more))
        batch["distance"].append(np.pad(hops + 1, (more, more)))
        if multi_hop:
            room = (0, steps - paths.shape[2])
            edges = np.pad(paths + 1, (more, more, room, (0, 0)))
        else:
            edges = np.pad(direct, (more, more, (0, 0)))
        batch["edges"].append(edges)
    return {name: np.stack(rows).astype(np.int32) for name, rows in batch.items()}


def _of_graph(graph: Graph, max_hops: int) -> tuple[np.ndarray, ...]:
    """Node numbers, degrees, hops, numbers of direct edges, and of those along paths (-1: none)."""
    count = len(graph.nodes)
    adjacency = np.zeros((count, count), int)
    start, end = graph.edges
    adjacency[start, end] = 1
    columns = numbered(graph.edge_features)
    direct = np.zeros((count, count, columns.shape[1]), int)
    direct[start, end] = columns + 1
    hops, between = shortest_paths(adjacency)
    longest = int(hops.max()) if count > 1 else 0
    steps = max(1, min(longest, max_hops) if max_hops > 0 else longest)
    paths = np.full((count, count, steps, columns.shape[1]), -1)
    for i in range(count):
        for j in range(count):
            if i == j or hops[i, j] >= UNREACHABLE:
                continue
            path = path_between(between, i, j)[: steps + 1]
            for k, (a, b) in enumerate(itertools.pairwise(path)):
                paths[i, j, k] = direct[a, b]
    return numbered(graph.nodes), adjacency.sum(1), hops, direct, paths
