import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    apply,
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled_state_dict,
    random_images,
    sin_loss,
)

import zoo
from zoo.models.vision import sret
from zoo.models.vision.sret import RecursiveStage, SlicedAttention


def filled(model):
    """Variables with unit-scale numbers; those of shared tensors by their second name."""
    state = filled_state_dict(model)
    for name in state:
        stage, _, rest = name.removeprefix("transformers.").partition(".blocks.")
        index, _, leaf = rest.partition(".")
        if leaf and int(index) % 4 == 0:
            state[name] = state[f"transformers.{stage}.blocks.{int(index) + 2}.{leaf}"]
    return zoo.convert(model, state)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(sret.__doc__)
    assert feature_shapes(zoo.create(name)) == table


@pytest.mark.parametrize("permuted", [False, True])
def test_slices_are_dense_attention_with_a_mask(permuted):
    layer, groups = SlicedAttention(num_heads=2), 3
    x = jax.random.normal(jax.random.key(0), (2, 12, 8))
    variables = layer.init(jax.random.key(1), x, groups)
    order = sret.fixed_permutation(12) if permuted else np.arange(12)
    group = np.empty(12, int)
    group[order] = np.arange(12) // 4
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    qkv = (np.asarray(x) @ p["qkv"]["kernel"] + p["qkv"]["bias"]).reshape(2, 12, 3, 2, 4)
    query, key, value = np.moveaxis(qkv, 2, 0)
    scores = np.einsum("bqnd,bknd->bnqk", query, key) / 2
    weights = np.exp(scores) * (group[:, None] == group[None])
    y = np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), value)
    wanted = y.reshape(2, 12, 8) @ p["out"]["kernel"] + p["out"]["bias"]
    got = layer.apply(variables, x, groups, jnp.asarray(order) if permuted else None)
    assert_trees_close(got, wanted, 1e-5)


def test_one_slice_is_the_model_without_slices():
    """In a stage, too, whose odd runs would permute."""
    x = jax.random.normal(jax.random.key(0), (1, 8, 8))
    whole = RecursiveStage(depth=2, recursive_num=1, num_heads=2)
    variables = jax.jit(whole.init)(jax.random.key(1), x)
    assert_trees_close(whole.clone(groups=(1, 1)).apply(variables, x), whole.apply(variables, x), 0)
    for groups in ((2, 1), (1, 2)):
        sliced = whole.clone(groups=groups).apply(variables, x)
        assert np.abs(sliced - whole.apply(variables, x)).max() > 1e-4


def test_the_gradient_of_shared_weights_is_the_sum_over_runs():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    shared = RecursiveStage(depth=2, recursive_num=1, num_heads=2)
    untied = shared.clone(recursive_num=2)
    variables = jax.jit(shared.init)(jax.random.key(1), x)
    params = variables["params"]
    copies = {"params": params | {"layers_1": params["layers_0"]}}

    def gradient(model, variables):
        return jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, x))))(variables)["params"]

    one, two = gradient(shared, variables), gradient(untied, copies)
    both = jax.tree.map(jnp.add, two["layers_0"], two["layers_1"])
    assert_trees_close(one["layers_0"], both, 1e-4)


def test_a_hundred_runs_have_the_weights_of_one_block():
    x = jax.ShapeDtypeStruct((1, 4, 8), jnp.float32)

    def sizes(depth):
        model = RecursiveStage(depth=depth, recursive_num=1, num_heads=2)
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        return {k: sum(p.size for p in jax.tree.leaves(v)) for k, v in params.items()}

    short, deep = sizes(2), sizes(100)
    assert [k for k in deep if k.startswith("layers")] == ["layers_0"]
    assert deep["layers_0"] == short["layers_0"]
    assert sum(k.startswith("bridges") for k in deep) == 100  # these are of each run


def test_evaluation_is_fixed_unless_it_is_given_a_key():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8))
    stage = RecursiveStage(depth=2, recursive_num=1, num_heads=2, groups=(1, 2))
    variables = jax.jit(stage.init)(jax.random.key(1), x)

    @jax.jit
    def runs(keys):
        fixed = stage.apply(variables, x)
        sampled = [stage.apply(variables, x, rngs={"sample": key}) for key in keys]
        return fixed, *sampled, stage.apply(variables, x, train=True, rngs={"dropout": keys[0]})

    fixed, first, again, other, trained = runs(
        jax.random.split(jax.random.key(0))[jnp.array([0, 0, 1])]
    )
    np.testing.assert_array_equal(first, again)
    for one, two in ((first, other), (first, fixed), (trained, fixed)):
        assert np.abs(one - two).max() > 1e-5


def test_the_two_names_of_a_shared_tensor_must_agree():
    model = zoo.create("sret_test")
    state = zoo.export(model, filled(model))
    names = [f"transformers.1.blocks.{i}.attn.qkv.weight" for i in (4, 6)]
    np.testing.assert_array_equal(state[names[0]], state[names[1]])
    with pytest.raises(ValueError, match="tied tensors differ in value"):
        zoo.convert(model, state | {names[1]: state[names[1]] + 1})


def test_other_image_sizes_resize_the_positions_and_need_not_be_square():
    small = zoo.create("sret_test")
    state = zoo.export(small, filled(small))
    model = zoo.create("sret_test", image_size=(96, 64))
    variables = zoo.convert(model, state, adapt=True)
    assert variables["params"]["position_embedding"].shape == (12, 8, 32)
    out = apply(model, variables, random_images(model, 1), method="features")
    assert [out[f"stage{i}"].shape[1:3] for i in (1, 2)] == [(12, 8), (6, 4)]
    assert np.isfinite(out["logits"]).all()


def test_sizes_that_do_not_fit_are_refused():
    shapes = lambda *size: jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)  # noqa: E731
    with pytest.raises(ValueError, match="of multiples of 8"):
        model = zoo.create("sret_test", image_size=60)
        jax.eval_shape(model.init, jax.random.key(0), shapes(60, 60))
    with pytest.raises(ValueError, match="25 tokens cannot be cut into 4 slices"):
        model = zoo.create("sret_test", image_size=40)
        jax.eval_shape(model.init, jax.random.key(0), shapes(40, 40))
    with pytest.raises(ValueError, match="depth=3 runs cannot be shared"):
        stage = RecursiveStage(depth=3, recursive_num=2, num_heads=1)
        stage.init(jax.random.key(0), jnp.zeros((1, 4, 4)))
