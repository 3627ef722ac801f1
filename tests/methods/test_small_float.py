"""Small floats on whole models, and what searching for biases brings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.test_prune import made, run
from model_helpers import assert_trees_close

from zoo.methods import SmallFloat
from zoo.methods.compress import quantise
from zoo.methods.float_quantize import Format, row_biases, search


def test_weights_are_on_the_grid_and_merge():
    model, inputs, variables = made("vit_test", depth=1)
    method = SmallFloat(input_bits=None)
    adapted = method.adapt(model, variables, jax.random.key(0))
    kernel = adapted["params"]["layers_0"]["mlp"]["up"]["kernel"]
    assert max(len(np.unique(np.abs(column))) for column in np.asarray(kernel).T) <= 8
    plain, merged = method.merge(method.wrap(model), adapted)
    assert_trees_close(run(plain, merged, inputs), run(method.wrap(model), adapted, inputs), 1e-6)


@pytest.mark.slow
def test_fewer_bits_err_more():
    model, inputs, variables = made("vit_test", depth=1)
    wanted = run(model, variables, inputs)
    errors = {}
    for bits in (8, 6, 4):
        method = SmallFloat(bits, 2, bits, 2)
        adapted = method.adapt(model, variables, jax.random.key(0), [inputs])
        errors[bits] = float(jnp.square(run(method.wrap(model), adapted, inputs) - wanted).mean())
    assert errors[8] < errors[6] < errors[4]


@pytest.mark.slow
@pytest.mark.parametrize("shifts", [True, False])
def test_a_search_makes_the_error_of_a_map_smaller(shifts):
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.t(keys[0], 3.0, (64, 24)) * 2.0 ** (jnp.arange(24) % 4)
    kernel, errors = jax.random.normal(keys[1], (24, 16)), []
    for rounds in (0, 1, 2):
        method = SmallFloat(shifts=shifts, rounds=rounds)
        weight, bias = method._quantised(kernel, rows)
        got = method._of_inputs.quantise(rows, bias) @ weight
        errors.append(float(jnp.square(got - rows @ kernel).mean()))
    assert errors[2] <= errors[1] < errors[0]


@pytest.mark.slow
def test_the_gradient_of_inputs_goes_straight_through():
    model, inputs, variables = made("vit_test", depth=1)
    method = SmallFloat()
    adapted = method.adapt(model, variables, jax.random.key(0), [inputs])
    wrapped = method.wrap(model)
    slope = jax.jit(jax.grad(lambda v: jnp.sum(wrapped.apply(v, **inputs) ** 2)))(adapted)
    for leaf in ("norm1", "norm2"):
        slopes = slope["params"]["layers_0"][leaf]["scale"]
        assert np.isfinite(slopes).all() and np.abs(slopes).max() > 0
    with pytest.raises(ValueError, match="comes from data"):
        method.adapt(model, variables, jax.random.key(0))


@pytest.mark.parametrize("heavy", [False, True])
def test_floats_hold_weights_better_than_whole_numbers_of_as_many_bits(heavy):
    draw = jax.random.normal if not heavy else lambda key, shape: jax.random.t(key, 3.0, shape)
    weight = draw(jax.random.key(0), (32, 256))
    form = Format.of(4, 2)
    bias = row_biases(form, weight)
    bias = search(form, weight, bias, lambda w: jnp.square(w - weight).mean(-1, keepdims=True))
    codes, scale = quantise(weight, bits=4)
    ours, theirs = (
        float(jnp.square(w - weight).mean()) for w in (form.quantise(weight, bias), codes * scale)
    )
    assert ours < (0.7 if heavy else 1.0) * theirs
