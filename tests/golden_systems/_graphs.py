"""Batches of graphs as PyTorch Geometric writes them, one after the other, padded to one size."""

import golden
import numpy as np


def padded(case: golden.Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The inputs of a graph model but positions, and which rows of nodes are real."""
    x, edges, batch = (case.input(name) for name in ("x", "edge_index", "batch"))
    attributes = case.input("edge_attr") if "edge_attr" in case.names else None
    sizes = np.bincount(batch)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    graphs, largest = len(sizes), int(sizes.max())
    owner = batch[edges[0]]
    counts = np.bincount(owner, minlength=graphs)
    nodes = np.zeros((graphs, largest, *x.shape[1:]), x.dtype)
    real = np.arange(largest) < sizes[:, None]
    nodes[real] = x
    inputs = {"nodes": nodes, "num_nodes": sizes.astype(np.int32)}
    inputs["edges"] = np.full((graphs, int(counts.max()), 2), largest, np.int32)
    if attributes is not None:
        attributes = attributes.reshape(len(attributes), -1)
        shape = (graphs, int(counts.max()), attributes.shape[1])
        inputs["edge_features"] = np.zeros(shape, attributes.dtype)
    for graph in range(graphs):
        mine = owner == graph
        inputs["edges"][graph, : counts[graph]] = (edges[:, mine] - first[graph]).T
        if attributes is not None:
            inputs["edge_features"][graph, : counts[graph]] = attributes[mine]
    for name in ("nodes", "edge_features"):
        if name in inputs and np.issubdtype(inputs[name].dtype, np.integer):
            inputs[name] = inputs[name].astype(np.int32)
    return inputs, real
