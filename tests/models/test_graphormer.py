"""Graphormer: the structure of a graph, and nothing else, biases who sees whom."""

import jax
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.data.graphs import Graph, graphormer_inputs, path_between, shortest_paths
from zoo.models.graph import graphormer


def tree(count, seed=0, columns=2):
    """A random tree: one path between any two nodes."""
    rng = np.random.default_rng(seed)
    parents = [(int(rng.integers(0, i)), i) for i in range(1, count)]
    edges = np.array([pair for a, b in parents for pair in ((a, b), (b, a))]).T
    kinds = np.repeat(rng.integers(0, 4, (count - 1, columns)), 2, 0)
    return Graph(rng.integers(0, 9, (count, columns)), edges, kinds)


@pytest.fixture(scope="module")
def model():
    return zoo.create("graphormer_test", num_nodes=2 * 512 + 16, num_edges=2 * 512 + 16)


@pytest.fixture(scope="module")
def run(model):
    """With rows of padding at zero, where training leaves them."""
    variables = jax.tree_util.tree_map_with_path(
        lambda keys, x: (
            x.at[0].set(0) if "embedding" in jax.tree_util.keystr(keys) and len(x) > 1 else x
        ),
        filled(model),
    )
    return jax.jit(lambda inputs: model.apply(variables, **inputs))


def test_features_have_the_documented_shapes():
    name, table = documented_shapes(graphormer.__doc__)
    found = feature_shapes(zoo.create(name))
    assert {key: found[key] for key in table} == table


def test_numbers_of_nodes_do_not_matter(run):
    graph = tree(6)
    order = np.random.default_rng(1).permutation(6)
    place = np.argsort(order)
    permuted = Graph(graph.nodes[order], place[graph.edges], graph.edge_features)
    one, other = (run(graphormer_inputs([g], 3)) for g in (graph, permuted))
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


def test_a_padded_batch_gives_what_each_graph_gives_alone(run):
    graphs = [tree(4, 1), tree(6, 2), tree(2, 3)]
    together = run(graphormer_inputs(graphs, 3, max_nodes=8))
    for graph, row in zip(graphs, together, strict=True):
        alone = run(graphormer_inputs([graph], 3))
        np.testing.assert_allclose(alone[0], row, atol=1e-5 * np.abs(together).max())


def test_edges_on_the_path_change_the_output_and_edges_elsewhere_the_bias_alone(run):
    graph = tree(5)
    other = Graph(graph.nodes, graph.edges, graph.edge_features + 1)
    one, two = (run(graphormer_inputs([g], 3)) for g in (graph, other))
    assert np.abs(one - two).max() > 1e-3 * np.abs(one).max()


def test_paths_are_shortest_and_what_is_not_connected_is_far():
    line = np.zeros((5, 5), int)
    for a, b in ((0, 1), (1, 2), (2, 3)):
        line[a, b] = line[b, a] = 1
    hops, between = shortest_paths(line)
    assert hops[0].tolist() == [0, 1, 2, 3, 510]
    assert path_between(between, 0, 3) == [0, 1, 2, 3]
    lonely = Graph(np.zeros((3, 2), int), np.array([[0, 1], [1, 0]]), np.zeros((2, 2), int))
    inputs = graphormer_inputs([lonely], 3)
    assert inputs["distance"][0, 0].tolist() == [1, 2, 511]
    assert not inputs["edges"][0, 0, 2].any() and inputs["edges"][0, 0, 1].any()
    with pytest.raises(ValueError, match="has 3 nodes, and max_nodes=2"):
        graphormer_inputs([lonely], max_nodes=2)
