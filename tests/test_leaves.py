"""Leaves of every network, the linear map and the norm: right, and traced once a shape."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.layers.dense import Dense
from zoo.layers.norm import LayerNorm


def inner_programs(jaxpr, name):
    """The programs of all calls of a compiled function of this name."""
    return [e.params["jaxpr"] for e in jaxpr.eqns if e.params.get("name") == name]


@pytest.mark.parametrize("name", ["_product", "_normalise"])
def test_layers_of_one_shape_share_a_program(name):
    few, many = (
        inner_programs(jax.make_jaxpr(model.apply)(variables, images), name)
        for model, variables, images in map(network, (2, 5))
    )
    assert len(many) > len(few)
    assert len(set(map(id, many))) == len(set(map(id, few)))


def network(depth):
    model = zoo.create("vit_test", depth=depth)
    (images,) = model.example_inputs(2).values()
    return model, jax.eval_shape(model.init, jax.random.key(0), images), images


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("affine", [{}, {"use_scale": False, "use_bias": False}])
def test_the_norm_is_that_of_flax_with_the_variance_of_two_passes(dtype, affine):
    x = (jax.random.normal(jax.random.key(0), (3, 5, 16)) + 100).astype(dtype or jnp.bfloat16)
    ours = LayerNorm(epsilon=1e-5, dtype=dtype, **affine)
    theirs = nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, **affine)
    variables = jax.tree.map(lambda t: t + 0.5, ours.init(jax.random.key(0), x))
    y, wanted = jax.jit(ours.apply)(variables, x), jax.jit(theirs.apply)(variables, x)
    assert y.dtype == wanted.dtype
    scale = np.abs(np.asarray(wanted, np.float32)).max()
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted.astype(jnp.float32), rtol=0,
        atol=4 * float(jnp.finfo(y.dtype).eps) * scale,
    )  # fmt: skip


def test_a_linear_map_differentiates_twice_forward_and_backward():
    layer, x = Dense(3), jax.random.normal(jax.random.key(0), (2, 4, 5))
    params = layer.init(jax.random.key(1), x)

    def value(params):
        return jnp.sin(layer.apply(params, x)).sum()

    def plainly(params):
        p = params["params"]
        return jnp.sin(jnp.einsum("bli,io->blo", x, p["kernel"]) + p["bias"]).sum()

    ones = jax.tree.map(jnp.ones_like, params)
    for twice in (
        lambda f: jax.jvp(jax.grad(f), (params,), (ones,))[1],
        lambda f: jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(jax.grad(f)(p)))))(params),
    ):
        for got, wanted in zip(*map(jax.tree.leaves, map(twice, (value, plainly))), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
