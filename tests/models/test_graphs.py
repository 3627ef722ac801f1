"""GraphGPS and GraphTrans: nodes have no order, graphs do not see each other, messages are sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.bigbird import BigBirdLayer, random_blocks, seen_blocks
from zoo.layers.graph import sum_at_nodes
from zoo.layers.graph_bias import PathBias, hops_and_paths
from zoo.layers.graph_positions import laplacian_eigenvectors, return_chances
from zoo.layers.messages import (
    AttentiveMessages,
    ConvolvedMessages,
    PrincipalMessages,
    SoftmaxMessages,
)
from zoo.models.graph import graphgps, graphtrans

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


@pytest.mark.parametrize(
    "local, attention", [("none", "softmax"), ("gine", "none"), ("gated", "none")]
)
def test_either_half_alone_is_a_network(local, attention):
    model = zoo.create("graphgps_test", local=local, attention=attention)
    variables = filled(model)
    moved = graph(6, 0, model)
    moved["edges"] = np.full_like(moved["edges"], 6)  # without edges
    run = jax.jit(lambda inputs: model.apply(variables, **inputs))
    same = np.array_equal(run(batch([graph(6, 0, model)])), run(batch([moved])))
    assert same == (local == "none")


def test_convolved_messages_are_the_normalised_adjacency():
    source, target = np.array([[0, 1, 1, 2]]), np.array([[1, 0, 2, 1]])
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    layer = ConvolvedMessages()
    variables = layer.init(jax.random.key(0), x, None, source, target)
    kernel = np.asarray(variables["params"]["map"]["kernel"])
    links = np.eye(3)
    links[target[0], source[0]] = 1
    root = links.sum(1) ** -0.5
    wanted = root[:, None] * links * root @ (x[0] @ kernel)
    found = layer.apply(variables, x, None, source, target)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# 1 -> 0, 2 -> 0, 0 -> 1, an edge of 0 to itself, one that is padding; nothing comes to 2
SOURCE, TARGET = np.array([[1, 2, 0, 0, 0]]), np.array([[0, 0, 1, 0, 3]])


def message_layer(layer):
    """What a layer makes of three nodes and the edges above, its inputs and its parameters."""
    rng = np.random.default_rng(0)
    x, edge = (rng.normal(size=(1, n, 4)).astype(np.float32) for n in (3, 5))
    inputs = (x, edge, SOURCE, TARGET, np.ones((1, 3), bool))
    variables = layer.init(jax.random.key(0), *inputs)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), variables["params"])
    found = layer.apply({**variables, "params": params}, *inputs)
    return np.asarray(found[0]), x[0], edge[0], jax.tree.map(np.asarray, params)


def affine(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


def test_attentive_messages_are_a_softmax_over_neighbours_and_oneself():
    found, x, edge, params = message_layer(AttentiveMessages(2))
    mapped = affine(params["map"], x).reshape(3, 2, 2)
    edges = {(1, 0): edge[0], (2, 0): edge[1], (0, 1): edge[2]}  # the edge to itself is replaced
    edges |= {(0, 0): (edge[0] + edge[1]) / 2, (1, 1): edge[2], (2, 2): np.zeros(4)}
    for node in range(3):
        near = [pair for pair in edges if pair[1] == node]
        scores = []
        for a, b in near:
            e = affine(params["map_edge"], edges[a, b]).reshape(2, 2)
            each = ((mapped[a], "source"), (mapped[b], "target"), (e, "edge"))
            score = sum((value * params[f"{name}_score"]).sum(-1) for value, name in each)
            scores.append(np.where(score > 0, score, 0.2 * score))
        weights = np.exp(scores) / np.exp(scores).sum(0)
        wanted = sum(w[:, None] * mapped[a] for w, (a, _) in zip(weights, near, strict=True))
        np.testing.assert_allclose(found[node], wanted.ravel() + params["bias"], rtol=1e-4)


def test_softmax_messages_weigh_each_channel_by_itself():
    found, x, edge, params = message_layer(SoftmaxMessages())
    m = np.maximum(x[SOURCE[0]] + edge, 0) + 1e-7
    summed = x.copy()
    for node in range(3):
        mine = m[TARGET[0] == node]
        if len(mine):
            summed[node] += (mine * np.exp(mine)).sum(0) / np.exp(mine).sum(0)
    y = affine(params["expand"], summed) / np.sqrt(1 + 1e-5)
    y = np.maximum(y * params["norm"]["scale"] + params["norm"]["bias"], 0)
    np.testing.assert_allclose(found, affine(params["reduce"], y), rtol=1e-4, atol=1e-5)


def test_principal_messages_are_the_mean_maximum_and_sum():
    found, x, edge, params = message_layer(PrincipalMessages())
    e = affine(params["embed_edge"], edge)
    real = TARGET[0] < 3
    pairs = [x[np.minimum(TARGET[0], 2)], x[SOURCE[0]], e]
    m = affine(params["message"], np.concatenate(pairs, 1))
    rows = []
    for node in range(3):
        mine = m[real & (TARGET[0] == node)]
        none = np.zeros(4)
        parts = [mine.mean(0), mine.max(0), mine.sum(0)] if len(mine) else [none] * 3
        rows.append(np.concatenate([x[node], *parts]))
    wanted = affine(params["out"], affine(params["update"], np.array(rows)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_of_performer_does_not_look_at_the_order_of_nodes():
    model = zoo.create("graphgps_test", local="none", attention="performer", depth=1)
    variables = filled(model)
    one, order = graph(6, 0, model), np.random.default_rng(1).permutation(6)
    moved = {**one, "nodes": one["nodes"][order], "walks": one["walks"][order]}
    run = jax.jit(lambda inputs: model.apply(variables, **inputs))
    found, other = run(batch([one])), run(batch([moved]))
    np.testing.assert_allclose(found, other, atol=2e-5 * np.abs(found).max())
    assert "unused_norm_local" in variables["params"]["layers_0"]  # as official files have it


def test_bigbird_is_softmax_in_which_a_block_counts_as_often_as_it_is_seen():
    size, blocks, heads = 2, 12, 2
    layer = BigBirdLayer(heads, size, random_blocks=2)
    x = np.random.default_rng(0).normal(size=(2, size * blocks - 1, 4)).astype(np.float32)
    visible = np.arange(x.shape[1]) < np.array([[23], [9]])
    variables = layer.init(jax.random.key(0), x, visible)
    p = jax.tree.map(np.asarray, variables["params"])
    counts = np.zeros((heads, blocks, blocks))
    counts[:, [0, -1]] = 1
    for head, rows in enumerate(seen_blocks(blocks, 2, heads)):
        for row, seen in enumerate(rows, 1):
            np.add.at(counts[head, row], seen[seen >= 0], 1)
    counts = counts.repeat(size, 1).repeat(size, 2)[:, :-1, :-1]
    query, key, value = (
        (x @ p[name]["kernel"]).reshape(2, -1, heads, 2) for name in ("query", "key", "value")
    )
    weight = np.exp(np.einsum("bqnd,bknd->bnqk", query, key) / np.sqrt(2))
    weight *= counts * visible[:, None, None]
    weight /= weight.sum(-1, keepdims=True)
    y = np.einsum("bnqk,bknd->bqnd", weight, value).reshape(x.shape) @ p["out"]["kernel"]
    normal = lambda t: (t - t.mean(-1, keepdims=True)) / t.std(-1, keepdims=True)  # noqa: E731
    x1 = normal(x + y)
    mlp = np.maximum(x1 @ p["mlp"]["up"]["kernel"], 0) @ p["mlp"]["down"]["kernel"]
    found = layer.apply(variables, x, visible)
    np.testing.assert_allclose(found[visible], normal(x1 + mlp)[visible], atol=1e-4)


def test_paths_are_the_shortest_and_name_the_types_of_their_edges():
    edges, types = np.array([[0, 1, 2, 0, 3], [1, 2, 3, 3, 4]]), np.array([5, 6, 7, 8, 9])
    hops, paths = hops_and_paths(edges, types, 5, 3)
    far = 3  # no path
    wanted = [[0, 1, 2, 1, 2], [far, 0, 1, 2, 2], [far, far, 0, 1, 2], [far, far, far, 0, 1]]
    np.testing.assert_array_equal(hops, [*wanted, [far, far, far, far, 0]])  # 1 to 4 is cut
    np.testing.assert_array_equal(paths[0, 2:], [[5, 6, 0], [8, 0, 0], [8, 9, 0]])


def test_bias_of_paths_is_a_sum_over_their_edges():
    bias = PathBias(num_heads=2, steps=3, edge_types=4)
    hops, paths = np.array([[[0, 2]]]), np.array([[[[0, 0, 0], [3, 1, 0]]]])
    variables = bias.init(jax.random.key(0), hops, paths)
    p = jax.tree.map(np.asarray, variables["params"])
    steps = sum(p["edge_embedding"][kind] @ p["hop_kernel"][k] for k, kind in enumerate((3, 1, 0)))
    found = bias.apply(variables, hops, paths)[0, :, 0, 1]
    np.testing.assert_allclose(found, p["distance_embedding"][2] + steps / 2, rtol=1e-5, atol=1e-7)


def test_biased_attention_says_what_it_needs():
    for fields, message in (
        ({"attention": "biased"}, "set path_steps, or give one"),
        ({"attention": "biased", "path_steps": 3}, "make them with hops_and_paths"),
        ({"eigenvectors": 2, "eigen_stable": True}, "set local"),
    ):
        model = zoo.create("graphgps_test", **fields)
        inputs = batch([graph(6, 0, model)])
        if "eigenvectors" in fields:
            inputs["eigen"] = jnp.zeros((1, 6, 2, 2))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda key, m=model, i=inputs: m.init(key, **i), jax.random.key(0))


def test_bigbird_says_how_many_blocks_it_needs():
    with pytest.raises(ValueError, match="pad to at least 10"):
        BigBirdLayer(2).init(jax.random.key(0), jnp.zeros((1, 9, 4)), jnp.ones((1, 9), bool))
    with pytest.raises(ValueError, match="draws 5 of 4 blocks"):
        random_blocks(4, 5, 1)


def test_the_transformer_may_see_the_last_nodes_of_a_graph_only():
    model = zoo.create("graphtrans_test", virtual_node=False, max_tokens=4)
    variables = filled(model)
    run = jax.jit(lambda inputs: model.apply(variables, **inputs))
    one = graph(6, 0, model)
    one["edges"] = np.full_like(one["edges"], 6)  # no message carries anything
    first, third = ({**one, "nodes": one["nodes"].copy()} for _ in range(2))
    first["nodes"][1] = (first["nodes"][1] + 1) % 3
    third["nodes"][2] = (third["nodes"][2] + 1) % 3
    found, same, other = (run(batch([g])) for g in (one, first, third))
    np.testing.assert_array_equal(found, same)
    assert np.abs(found - other).max() > 1e-4 * np.abs(found).max()


def test_eigenvectors_of_the_laplacian_of_a_ring_are_waves():
    ring = np.array([(i, (i + d) % 5) for i in range(5) for d in (1, -1)]).T
    found = laplacian_eigenvectors(ring, 5, 7)
    values = 2 - 2 * np.cos(2 * np.pi * np.array([0, 1, 1, 2, 2]) / 5)
    np.testing.assert_allclose(found[:, :5, 1], np.tile(values, (5, 1)), atol=1e-6)
    assert np.isnan(found[:, 5:]).all()
    halved = laplacian_eigenvectors(ring, 5, 5, normalised=True)
    np.testing.assert_allclose(halved[0, :, 1], values / 2, atol=1e-6)


def test_signnet_does_not_look_at_the_signs_of_eigenvectors():
    model = zoo.create(
        "graphgps_test", depth=1, walk_steps=0, eigenvectors=4, sign_layers=2, sign_width=8,
        sign_out=4, sign_post_layers=2,
    )  # fmt: skip
    one, variables = graph(5, 0, model), filled(model)
    eigen = laplacian_eigenvectors(one["edges"][:10].T, 5, 4)
    eigen = np.pad(eigen, ((0, 1), (0, 0), (0, 0)))
    run = jax.jit(lambda inputs: model.apply(variables, **inputs))
    with_signs = [
        run(batch([one | {"eigen": eigen * np.array(signs, np.float32)[:, None]}]))
        for signs in ((1, 1, 1, 1), (-1, 1, -1, 1), (1, 3, 1, 1))
    ]
    np.testing.assert_allclose(with_signs[1], with_signs[0], rtol=1e-5, atol=1e-5)
    assert np.abs(with_signs[2] - with_signs[0]).max() > 1e-3


def test_positions_in_eigenvectors_do_not_look_at_what_is_not_there():
    model = zoo.create("graphgps_test", eigenvectors=7, walk_steps=0)
    variables = filled(model)
    run = jax.jit(lambda inputs: model.apply(variables, **inputs))

    def with_eigen(nodes):
        one = graph(nodes, nodes, model)
        edges = one["edges"][one["edges"][:, 1] < 6].T
        eigen = laplacian_eigenvectors(edges, nodes, 7)
        return one | {"eigen": np.pad(eigen, ((0, 6 - nodes), (0, 0), (0, 0)))}

    together = run(batch([with_eigen(n) for n in (6, 3)]))
    assert np.isfinite(together).all()
    alone = run(batch([with_eigen(3)]))[0]
    np.testing.assert_allclose(alone, together[1], atol=2e-5 * np.abs(together).max())
    with pytest.raises(ValueError, match="make it with laplacian_eigenvectors"):
        model.apply(variables, **batch([graph(3, 3, model)]))
