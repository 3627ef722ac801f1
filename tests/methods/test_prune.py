"""Zeros that stay zeros, scores that are learned, and heads and neurons that are cut out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from methods.test_lora import random_inputs
from model_helpers import assert_trees_close

import zoo
from zoo.methods import Movement, Prune, PruneHeads, PruneNeurons
from zoo.methods.cut import head_importances
from zoo.methods.prune import sparse_gpt


def variant(*values):
    return pytest.param(*values, marks=pytest.mark.variants)


def made(name, **fields):
    fields = {"depth": 2, **fields} if name == "vit_test" else fields
    model = zoo.create(name, **fields)
    inputs = random_inputs(model)
    inputs |= {k: x % 2 for k, x in inputs.items() if k in ("token_types", "mask")}
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)
    # biases that are not zero, so that a forgotten one shows
    grown = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), variables
    )
    return model, inputs, grown


def run(model, variables, inputs):
    return jax.jit(lambda v: model.apply(v, **inputs))(variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, batches",
    [
        variant(Prune(0.75), False),
        (Prune(pattern=(2, 4)), False),
        variant(Prune(0.5, None, "sparse_gpt"), True),
    ],
    ids=("magnitude", "2:4", "sparse_gpt"),
)
def test_zeros_are_as_many_as_asked_for_and_have_no_gradient(method, batches):
    model, inputs, variables = made("vit_test")
    adapted = method.adapt(model, variables, jax.random.key(1), [inputs] if batches else None)
    kernel = adapted["params"]["layers_0"]["mlp"]["up"]["kernel"]
    share = 0.5 if method.pattern else method.sparsity
    assert np.mean(kernel == 0) == share
    if method.pattern:
        assert (np.count_nonzero(kernel.reshape(-1, 4, kernel.shape[1]), axis=1) == 2).all()
    wrapped = method.wrap(model)
    slope = jax.jit(jax.grad(lambda v: (wrapped.apply(v, **inputs) ** 2).sum()))(adapted)
    slope = slope["params"]["layers_0"]["mlp"]["up"]["kernel"]
    assert not slope[kernel == 0].any() and slope[kernel != 0].all()
    plain, merged = method.merge(wrapped, adapted)
    assert_trees_close(run(plain, merged, inputs), run(wrapped, adapted, inputs), 1e-5)


def test_sparse_gpt_errs_less_than_magnitude():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (200, 24)) @ (jnp.eye(24) + 0.7)  # one direction is large
    kernel = jax.random.normal(keys[2], (24, 16))
    for pattern in (None, (2, 4)):
        pruned = sparse_gpt(kernel, x.T @ x, 0.5, pattern)
        assert np.mean(pruned == 0) == 0.5
        from zoo.methods.prune import mask_of

        plain = kernel * mask_of(kernel, 0.5, pattern)
        error = [float(((x @ k - x @ kernel) ** 2).sum()) for k in (pruned, plain)]
        assert error[0] < 0.4 * error[1]


@pytest.mark.slow
def test_scores_move_by_weight_times_gradient():
    model, inputs, variables = made("vit_test")
    method = Movement(0.5)
    adapted = method.adapt(model, variables, jax.random.key(1))
    wrapped = method.wrap(model)
    plain, merged = method.merge(wrapped, adapted)
    assert_trees_close(run(plain, merged, inputs), run(wrapped, adapted, inputs), 1e-5)
    slope = jax.jit(jax.grad(lambda v: (wrapped.apply(v, **inputs) ** 2).sum()))(adapted)
    dense = jax.jit(jax.grad(lambda v: (plain.apply(v, **inputs) ** 2).sum()))(merged)
    at = lambda tree: tree["params"]["layers_1"]["mlp"]["down"]  # noqa: E731
    wanted = at(dense)["kernel"] * at(adapted)["kernel"]
    np.testing.assert_allclose(
        at(slope)["movement_score"], wanted, atol=1e-4 * np.abs(wanted).max()
    )


@pytest.mark.parametrize(
    "name", ["vit_test", variant("bert_test"), variant("gpt2_test"), variant("opt_test")]
)
def test_heads_are_gone_and_zeros_in_their_place_change_nothing(name):
    model, inputs, variables = made(name, **({"attention_dropout": 0.0} if "bert" in name else {}))
    method = PruneHeads(0.5)
    adapted = method.adapt(model, variables, jax.random.key(1))
    wrapped = method.wrap(model)
    got = run(wrapped, adapted, inputs)
    plain, merged = method.merge(wrapped, adapted)
    assert plain == model
    assert_trees_close(got, run(plain, merged, inputs), 2e-5)
    assert np.abs(got - run(model, variables, inputs)).max() > 1e-3
    sizes = [sum(x.size for x in jax.tree.leaves(v["params"])) for v in (variables, adapted)]
    place = next(p for p in flatten_dict(adapted["params"]) if p[-2:] == ("out", "kernel"))
    rows, width = flatten_dict(adapted["params"])[place].shape
    assert rows == round(0.5 * model.num_heads) * width // model.num_heads
    rows = width - rows
    biases = 3 * rows  # of query, key and value
    assert sizes[0] - sizes[1] == model.depth * (4 * width * rows + biases)


def test_chosen_heads_are_those_that_are_kept():
    model, _, variables = made("vit_test")
    heads = tuple(range(model.num_heads))
    every = tuple((f"layers_{i}/attention", heads) for i in range(model.depth))
    whole = PruneHeads(heads=every)
    adapted = whole.adapt(model, variables, jax.random.key(0))
    assert_trees_close(adapted, variables, 0)
    with pytest.raises(ValueError, match="the attention modules are layers_0/attention"):
        PruneHeads(heads=(("attention", (0,)),)).adapt(model, variables, jax.random.key(0))


@pytest.mark.slow
def test_a_head_without_output_has_no_importance():
    model, inputs, variables = made("vit_test")
    kernel = variables["params"]["layers_0"]["attention"]["out"]["kernel"]
    width = kernel.shape[0] // model.num_heads
    params = jax.tree.map(lambda x: x, variables["params"])
    params["layers_0"]["attention"]["out"]["kernel"] = kernel.at[:width].set(0)
    batches = [{k: x[i : i + 1] for k, x in inputs.items()} for i in range(2)]
    found = head_importances(model, {"params": params}, lambda y, _: (y**2).sum(), batches)[
        "layers_0/attention"
    ]
    assert found[0] == 0 and (found[1:] > 0).all()


@pytest.mark.parametrize("name", ["vit_test", variant("llama_test")])
def test_neurons_are_gone_and_zeros_in_their_place_change_nothing(name):
    model, inputs, variables = made(name)
    method = PruneNeurons(0.25)
    adapted = method.adapt(model, variables, jax.random.key(1))
    wrapped = method.wrap(model)
    plain, merged = method.merge(wrapped, adapted)
    assert plain == model
    assert_trees_close(run(wrapped, adapted, inputs), run(plain, merged, inputs), 2e-5)
    before, after = (
        v["params"]["layers_0"]["mlp"]["up"]["kernel"].shape[-1] for v in (variables, adapted)
    )
    assert after == round(0.25 * before)
