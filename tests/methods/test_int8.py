"""INT8 on whole models: bytes, outputs, scales, and LoRA beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from methods.test_lora import moved, random_inputs
from model_helpers import assert_trees_close

import zoo
from zoo.methods import Int8, LoRA, adapt_all, wrap_all
from zoo.methods.int8 import product


def made(name, **fields):
    model = zoo.create(name, **fields)
    inputs = random_inputs(model)
    return model, inputs, jax.jit(model.init)(jax.random.key(0), **inputs)


def run(model, variables, inputs):
    return jax.jit(lambda v: model.apply(v, **inputs))(variables)


@pytest.mark.parametrize(
    "method",
    [
        Int8(),
        pytest.param(Int8("tensor"), marks=pytest.mark.variants),
        pytest.param(Int8(smooth=0.5), marks=pytest.mark.variants),
        pytest.param(Int8("tensor", 0.5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_logits_stay_within_two_percent_and_kernels_take_a_quarter(method):
    model, inputs, variables = made("gpt2_test", scan_layers=method == Int8())
    adapted = method.adapt(model, variables, jax.random.key(1), [inputs])
    wanted, got = (
        run(m, v, inputs) for m, v in ((model, variables), (method.wrap(model), adapted))
    )
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.abs(got - wanted).max() > 0
    before, after = (flatten_dict(v["params"]) for v in (variables, adapted))
    kernels = [path for path, leaf in after.items() if leaf.dtype == jnp.int8]
    assert len(kernels) == 4 * (1 if method == Int8() else model.depth)
    assert all(4 * after[path].nbytes == before[path].nbytes for path in kernels)


@pytest.mark.slow
def test_weights_alone_merge_into_a_plain_model():
    model, inputs, variables = made("vit_test", depth=1)
    method = Int8(activations=None, smooth=0.5)
    adapted = method.adapt(model, variables, jax.random.key(1), [inputs])
    plain, merged = method.merge(method.wrap(model), adapted)
    assert plain == model
    assert_trees_close(run(plain, merged, inputs), run(method.wrap(model), adapted, inputs), 1e-5)
    again = method.adapt(model, merged, jax.random.key(1), [inputs])
    codes = [
        flatten_dict(v["params"])[("layers_0", "mlp", "up", "kernel")] for v in (adapted, again)
    ]
    np.testing.assert_allclose(*codes, atol=1)
    with pytest.raises(ValueError, match="does not round its inputs"):
        Int8().merge(Int8().wrap(model), variables)


@pytest.mark.slow
def test_lora_trains_beside_it_and_not_under_it():
    model, inputs, variables = made("vit_test", depth=1)
    methods = Int8(), LoRA(rank=2)
    adapted = moved(adapt_all(model, variables, methods, jax.random.key(1)))
    wrapped = wrap_all(model, methods)

    def loss(lora):
        params = flatten_dict(adapted["params"]) | lora
        params = jax.tree.map(lambda x: x, params)

        return jnp.sum(wrapped.apply({"params": unflatten_dict(params)}, **inputs) ** 2)

    lora = {
        p: x for p, x in flatten_dict(adapted["params"]).items() if methods[1].trains("/".join(p))
    }
    grads = jax.jit(jax.grad(loss))(lora)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads.values())
    with pytest.raises(ValueError, match="put LoRA behind it"):
        adapt_all(model, variables, methods[::-1], jax.random.key(1))


def test_the_gradient_of_the_input_goes_straight_through():
    kernel = jnp.array([[3, -4], [5, 6]], jnp.int8)
    scale = jnp.array([0.5, 2.0])
    slope = jax.grad(lambda x: product(x, kernel, scale, None).sum())(jnp.array([[1.0, 0.3]]))
    np.testing.assert_allclose(slope, [[3 * 0.5 - 8, 2.5 + 12]])


def test_a_range_of_inputs_needs_data():
    model, _, variables = made("vit_test", depth=1)
    with pytest.raises(ValueError, match="comes from data"):
        Int8("tensor").adapt(model, variables, jax.random.key(0))
