"""GraphGPS and GraphTrans: nodes have no order, graphs do not see each other, messages are sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.graph import sum_at_nodes
from zoo.models.graph import graphgps, graphtrans
from zoo.models.graph.graphgps import return_chances

NAMES = ("graphgps_test", "graphtrans_test")


def graph(nodes, seed, model, size=6, room=12):
    """A ring with features, padded."""
    rng = np.random.default_rng(seed)
    ring = [(i, (i + 1) % nodes) for i in range(nodes)] if nodes > 2 else [(0, 1)]
    edges = np.array([pair for a, b in ring for pair in ((a, b), (b, a))])
    padded = np.full((room, 2), size)
    padded[: len(edges)] = edges
    found = {
        "nodes": np.pad(rng.integers(0, 3, (nodes, len(model.node_numbers))),
                        ((0, size - nodes), (0, 0))),
        "edges": padded,
        "edge_features": np.zeros((room, len(model.edge_numbers)), int),
        "num_nodes": np.array(nodes),
    }  # fmt: skip
    if "walks" in model.example_inputs():
        walks = return_chances(edges.T, nodes, model.walk_steps)
        found["walks"] = np.pad(walks, ((0, size - nodes), (0, 0)))
    return found


def batch(graphs):
    return {name: jnp.asarray(np.stack([g[name] for g in graphs])) for name in graphs[0]}


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    model = zoo.create(request.param)
    variables = filled(model)
    return model, jax.jit(lambda inputs: model.apply(variables, **inputs))


@pytest.mark.parametrize("module", [graphgps, graphtrans], ids=lambda m: m.__name__[-10:])
def test_features_have_the_documented_shapes(module):
    name, table = documented_shapes(module.__doc__)
    found = feature_shapes(zoo.create(name))
    assert {key: found[key] for key in table} == table


def test_numbers_of_nodes_do_not_matter(network):
    model, run = network
    one = graph(6, 0, model)
    order = np.random.default_rng(1).permutation(6)
    place = np.append(np.argsort(order), 6)
    other = {**one, "nodes": one["nodes"][order], "edges": place[one["edges"]]}
    if "walks" in one:
        other["walks"] = one["walks"][order]
    a, b = run(batch([one])), run(batch([other]))
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())


def test_a_batch_gives_what_each_graph_gives_alone(network):
    model, run = network
    graphs = [graph(n, n, model) for n in (3, 6, 2)]
    together = run(batch(graphs))
    for one, row in zip(graphs, together, strict=True):
        np.testing.assert_allclose(run(batch([one]))[0], row, atol=2e-5 * np.abs(together).max())


def test_what_padding_holds_does_not_matter(network):
    model, run = network
    one = graph(4, 0, model)
    other = {k: v.copy() for k, v in one.items()}
    other["nodes"][4:] = 2
    other["edge_features"][8:] = 3
    np.testing.assert_array_equal(run(batch([one])), run(batch([other])))


def test_messages_of_padded_edges_are_lost():
    messages = jnp.ones((1, 3, 2))
    found = sum_at_nodes(messages, jnp.array([[0, 2, 3]]), 3)
    np.testing.assert_array_equal(found[0, :, 0], [1, 0, 1])


def test_chances_of_return_on_a_ring():
    ring = np.array([(i, (i + d) % 5) for i in range(5) for d in (1, -1)]).T
    chances = return_chances(ring, 5, 4)
    np.testing.assert_allclose(chances, np.tile([0, 1 / 2, 0, 3 / 8], (5, 1)), atol=1e-7)


@pytest.mark.parametrize("local, attend", [("none", True), ("gine", False), ("gated", False)])
def test_either_half_alone_is_a_network(local, attend):
    model = zoo.create("graphgps_test", local=local, attend=attend)
    variables = filled(model)
    moved = graph(6, 0, model)
    moved["edges"] = np.full_like(moved["edges"], 6)  # without edges
    run = jax.jit(lambda inputs: model.apply(variables, **inputs))
    same = np.array_equal(run(batch([graph(6, 0, model)])), run(batch([moved])))
    assert same == (local == "none")


def test_convolved_messages_are_the_normalised_adjacency():
    source, target = np.array([[0, 1, 1, 2]]), np.array([[1, 0, 2, 1]])
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    layer = graphgps.ConvolvedMessages()
    variables = layer.init(jax.random.key(0), x, source, target)
    kernel = np.asarray(variables["params"]["map"]["kernel"])
    links = np.eye(3)
    links[target[0], source[0]] = 1
    root = links.sum(1) ** -0.5
    wanted = root[:, None] * links * root @ (x[0] @ kernel)
    np.testing.assert_allclose(layer.apply(variables, x, source, target)[0], wanted, atol=1e-5)
