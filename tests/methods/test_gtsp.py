"""What holds of sparse tokens, heads, layers and weights on graph transformers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from zoo.data.graphs import Graph, graphormer_inputs
from zoo.methods import SparseHeads, SparseLayers, SparseTokens, SparseWeights, gtsp
from zoo.methods.gtsp import COLLECTION, death_and_growth, global_masks, regrown
from zoo.tasks import Classification, Sparsified

HOSTS = ("graphgps_test", "graphtrans_test", "graphormer_test", "gps_test")
SOME = [n if n == "gps_test" else pytest.param(n, marks=pytest.mark.variants)
        for n in HOSTS]  # fmt: skip


def graphs(name, sizes=(6, 4, 5), key=0, depth=1):
    """Cycles of these sizes as a batch for a host."""
    model, rng = zoo.create(name, depth=depth), np.random.default_rng(key)
    largest = max(sizes)
    edges = [np.stack([np.arange(n), (np.arange(n) + 1) % n]) for n in sizes]
    edges = [np.concatenate([e, e[::-1]], 1) for e in edges]
    if name.startswith("graphormer"):
        drawn = [Graph(rng.integers(0, 3, (n, 1)), e, rng.integers(0, 2, (e.shape[1], 1)))
                 for n, e in zip(sizes, edges, strict=True)]  # fmt: skip
        return model, graphormer_inputs(drawn, model.max_hops, model.edge_type == "multi_hop")
    inputs = {}
    for name_, spec in model.example_inputs(len(sizes)).items():
        shape = list(spec.shape)
        shape[1:2] = [largest] if name_ in ("nodes", "walks") else shape[1:2]
        if name_ == "edges" or name_ == "edge_features":
            shape[1] = 2 * largest
        made = rng.integers(0, 2, shape) if spec.dtype == jnp.int32 else rng.normal(size=shape)
        inputs[name_] = made.astype(spec.dtype)
    inputs["num_nodes"] = np.array(sizes, np.int32)
    inputs["edges"] = np.full((len(sizes), 2 * largest, 2), largest, np.int32)
    for i, e in enumerate(edges):
        inputs["edges"][i, : e.shape[1]] = e.T
    return model, inputs


def initialised(model, inputs):
    return jax.jit(model.init)(jax.random.key(0), **inputs)


def output(model, variables, inputs, **options):
    return jax.jit(lambda v: model.apply(v, **inputs, **options))(variables)


@pytest.mark.parametrize("name", SOME)
def test_masks_that_keep_everything_change_no_bit(name):
    model, inputs = graphs(name)
    variables = initialised(model, inputs)
    plain, module = output(model, variables, inputs), model
    for method in (SparseTokens(1.0), SparseHeads(1.0), SparseLayers(0.0), SparseWeights()):
        variables = method.adapt(module, variables, jax.random.key(1))
        module = method.wrap(module)
    np.testing.assert_array_equal(output(module, variables, inputs), plain)


@pytest.mark.parametrize("name", SOME)
def test_gathered_tokens_are_zeroed_ones_whose_keys_nobody_sees(name):
    """Of the attention alone: kept tokens get the same, the others nothing."""
    model, inputs = graphs(name)
    method = SparseTokens(0.5, keep_first=int(name != "gps_test"))
    wrapped = method.wrap(model)
    variables = method.adapt(model, initialised(model, inputs), jax.random.key(1))

    @jax.jit
    def run(variables):
        return wrapped.apply(
            variables, **inputs, mutable=["intermediates"],
            capture_intermediates=lambda module, _: gtsp.is_graph_attention(module),
        )[1]["intermediates"]  # fmt: skip

    first = next(x for k, x in sorted(run(variables).items()) if k.startswith("layers_0"))
    kept, y = first["attention"]["kept"][0], first["attention"]["__call__"][0]
    length = kept.shape[1]
    assert (kept.sum(1) == method.kept(length)).all()
    assert method.kept(length) == max(1, length // 2)
    assert np.abs(y[kept > 0]).max() > 0 and not y[kept == 0].any()
    if method.keep_first:
        assert kept[:, 0].all()
    if name == "gps_test":  # the same by hand
        attention = gtsp.Attention(4)
        x = np.asarray(
            model.apply(initialised(model, inputs), **inputs, method="features")["embed"]
        )
        leaves = dict(variables["params"]["layers_0"]["attention"])
        leaves.pop("token_score")
        real = np.arange(length) < inputs["num_nodes"][:, None]
        visible = (np.asarray(kept) > 0) & real
        wanted = attention.apply({"params": leaves}, x, jnp.asarray(visible))
        np.testing.assert_allclose(y[visible], wanted[visible], atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_gradients_reach_scores_and_noise_is_drawn_in_training_only():
    model, inputs = graphs("gps_test")
    method = SparseTokens(0.5)
    wrapped = method.wrap(model)
    variables = method.adapt(model, initialised(model, inputs), jax.random.key(1))

    @jax.jit
    def run(params, key):
        rest = {**variables, "params": params}
        y, _ = wrapped.apply(rest, **inputs, train=True, rngs={"dropout": key},
                             mutable=["batch_stats"])  # fmt: skip
        return jnp.sin(y).sum(), y

    grads = jax.grad(run, has_aux=True)(variables["params"], jax.random.key(0))[0]
    score = grads["layers_0"]["attention"]["token_score"]["kernel"]
    assert np.isfinite(score).all() and np.abs(score).max() > 0
    outs = [run(variables["params"], jax.random.key(k))[1] for k in range(4)]
    assert any(np.abs(outs[0] - other).max() > 0 for other in outs[1:])


def test_scores_of_half_the_tokens_are_a_quarter():
    """Multiply-adds of attention on long graphs, counted by the compiler."""

    def flops(ratio, length):
        module = SparseTokens(ratio).wrap(_Only())
        x = jnp.zeros((1, length, 8))
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        compiled = jax.jit(module.apply).lower(variables, x).compile()
        return compiled.cost_analysis()["flops"]

    # what is quadratic in the length: the second difference
    def quadratic(ratio):
        a, b, c = (flops(ratio, n) for n in (64, 128, 192))
        return a - 2 * b + c

    assert quadratic(0.5) / quadratic(1.0) == pytest.approx(0.25, abs=0.02)


def test_attention_among_some_is_drawn_among_all():
    from zoo.evaluators.molecules import _among_all

    kept = np.array([[1, 0, 1, 0], [0, 1, 1, 0]], bool)
    whole = _among_all(np.arange(8.0).reshape(2, 2, 2) + 1, kept)
    np.testing.assert_array_equal(whole[0][[0, 0, 2, 2], [0, 2, 0, 2]], [1, 2, 3, 4])
    np.testing.assert_array_equal(whole[1][1:3, 1:3], [[5, 6], [7, 8]])
    assert np.count_nonzero(whole) == 8


class _Only(gtsp.nn.Module):
    @gtsp.nn.compact
    def __call__(self, x):
        return gtsp.Attention(2, name="attention")(x)


@pytest.mark.slow
def test_layers_left_out_cost_nothing_and_dropping_is_by_node_in_training():
    model, inputs = graphs("gps_test", depth=2)
    variables = initialised(model, inputs)
    without = SparseLayers(without="layers_1/attention").wrap(model)

    def flops(module):
        return jax.jit(lambda v: module.apply(v, **inputs)).lower(variables).compile(
        ).cost_analysis()["flops"]  # fmt: skip

    assert flops(without) < 0.9 * flops(model)
    dropping = SparseLayers(0.5).wrap(model)
    np.testing.assert_array_equal(
        output(dropping, variables, inputs), output(model, variables, inputs)
    )
    run = jax.jit(lambda k: dropping.apply(variables, **inputs, train=True, rngs={"dropout": k},
                                           mutable=["batch_stats"])[0])  # fmt: skip
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 0
    with pytest.raises(ValueError, match="must be node, graph or layer"):
        SparseLayers(per="edge")


def test_heads_die_and_grow_and_stay_as_many():
    active = jnp.array([0.0, 1, 1, 1, 0, 0])
    scores = jnp.array([9.0, 3, 1, 2, 9, 9])
    norms = jnp.array([5.0, 0, 4, 1, 7, 1])
    got = death_and_growth(active, scores, norms, 0.5)  # 2 and 3 die; 4 and 0 grow
    np.testing.assert_array_equal(got, [1, 1, 0, 0, 1, 0])
    for death in (0.0, 0.25, 1.0):
        assert death_and_growth(active, scores, norms, death).sum() == 3


def test_weights_grow_where_the_slope_is_large():
    mask, weight = jnp.array([1.0, 1, 1, 1, 0, 0]), jnp.array([4.0, 1, 3, 2, 0, 0])
    slope = jnp.array([0.0, 0, 0, 5, 6, 1])
    np.testing.assert_array_equal(regrown(mask, weight, slope, 0.5), [1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(regrown(mask, weight, slope, 0.0), mask)
    whole = global_masks([jnp.array([3.0, 1.0]), jnp.array([2.0, 4.0, 5.0])], 0.0)
    assert all(m.all() for m in whole)


@pytest.fixture(scope="module")
def trained():
    """Twenty steps of Adam on a small host with three methods."""
    model, inputs = graphs("gps_test")
    methods = (
        SparseHeads(0.5, 0.5, every=6),
        SparseWeights(final_density=0.3, begin=4, end=16, every=4, total=20),
        SparseLayers(0.1),
    )
    variables, module = initialised(model, inputs), model
    for i, method in enumerate(methods):
        variables = method.adapt(module, variables, jax.random.key(i))
        module = method.wrap(module)
    task = Sparsified(Classification())
    batch = {**inputs, "labels": np.arange(3) % 2, "valid": np.ones(3, bool)}
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, rest, state, key):
        def loss(params):
            value, aux = task.loss(module, {**rest, "params": params}, {}, batch, key, "train")
            return value, aux.collections

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), rest, state, value

    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    state, seen = optimizer.init(params), []
    for i in range(20):
        params, rest, state, value = step(params, rest, state, jax.random.key(i))
        seen.append((float(value), jax.device_get(rest[COLLECTION])))
    return model, module, methods, {**rest, "params": params}, seen, inputs


def test_numbers_of_heads_and_weights_are_those_of_the_schedule(trained):
    _, _, (heads, weights, _), variables, seen, _ = trained
    changed = []
    for (_, before), (_, after) in itertools.pairwise(seen):
        pair = [m["layers_0"]["attention"]["heads"] for m in (before, after)]
        assert pair[0].sum() == pair[1].sum() == 2
        changed.append(np.any(pair[0] != pair[1]))
    assert not any(changed[i] for i in range(19) if (i + 2) % heads.every)
    total = sum(m.size for p, m in gtsp.flatten_dict(variables[COLLECTION]).items()
                if p[-1] == "kernel")  # fmt: skip
    kept = round(gtsp.density(variables) * total)
    assert abs(kept - int(total * weights.final_density)) <= 1
    assert int(variables[COLLECTION]["step"]) == 20
    assert all(np.isfinite(value) for value, _ in seen)


def test_taken_away_the_masks_are_zeros_in_the_weights(trained):
    model, module, methods, variables, _, inputs = trained
    masks = variables[COLLECTION]["layers_0"]["attention"]
    wanted = output(module, variables, inputs)
    inner = module
    for method in methods[::-1]:
        inner, variables = method.merge(inner, variables)
    assert inner == model and COLLECTION not in variables
    attention = dict(variables["params"]["layers_0"]["attention"])
    kernel = np.asarray(attention["qkv"]["kernel"]).reshape(32, 3, 4, 8)
    off = np.asarray(masks["heads"]) == 0
    assert off.sum() == 2 and not kernel[:, :, off].any() and kernel[:, :, ~off].any()
    got = output(model, variables, inputs)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="above 0, and at most 1"):
        SparseTokens(0.0)
    with pytest.raises(ValueError, match="No multiple of every=100"):
        SparseWeights(begin=10, end=20)
    with pytest.raises(ValueError, match="has no plain form"):
        SparseTokens().merge(zoo.create("gps_test"), {})
    with pytest.raises(ValueError, match="density=0"):
        SparseHeads(0.0)
    with pytest.raises(ValueError, match="needs SparseHeads or SparseWeights"):
        Sparsified(Classification()).loss(
            zoo.create("gps_test"), {}, {}, {}, jax.random.key(0), "train"
        )
    assert dataclasses.replace(SparseTokens(), ratio=0.1).kept(5) == 1
