import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    apply,
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    random_images,
)

import kernels_pallas
import zoo
from zoo.models.vision import fmvit
from zoo.models.vision.fmvit import RepConv, average, deploy, frequency_bands, merge


@pytest.fixture(scope="module")
def small():
    model = zoo.create("fmvit_test")
    return model, filled(model)


def numbers(*shape, key=0):
    return np.random.default_rng(key).normal(size=shape).astype(np.float32)


def test_shapes_are_those_of_the_docstring_which_says_what_it_is():
    name, table = documented_shapes(fmvit.__doc__)
    assert feature_shapes(zoo.create(name)) == table
    assert "reconstruction" in fmvit.__doc__.split("\n")[0]
    assert "not verified" in fmvit.__doc__.split("\n")[0]


# ------------------------------------------------------------------------ reparameterization


def trained(layer, x):
    """Variables of a layer with statistics that are not those of initialisation."""
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(variables)
    other = [p + 0.3 * np.abs(numbers(*p.shape, key=i)) for i, p in enumerate(leaves)]
    return jax.tree.unflatten(tree, other)


@pytest.mark.parametrize(
    ("size", "groups", "stride", "identity"),
    [(1, (1, 2, 4), 1, True), (3, (1, 2), 1, True), (3, (4,), 1, False), (3, (2, 4), 2, True)],
)
def test_branches_are_one_convolution_borders_included(size, groups, stride, identity):
    layer = RepConv(8, size, stride, groups, identity)
    x = numbers(2, 7, 6, 8) + 1.0  # a mean, which padding with zeros does not share
    variables = trained(layer, x)
    one = merge(variables["params"], variables["batch_stats"])
    assert one["kernel"].shape[-2:] == (8 // np.gcd.reduce(groups), 8)
    got = apply(layer.clone(deploy=True), {"params": one}, x)
    wanted = apply(layer, variables, x)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_grouped_kernels_are_block_diagonal():
    kernel = numbers(2, 8)  # 4 groups of 2 channels
    full = np.asarray(fmvit.regroup(kernel, 4, 1))
    wanted = np.zeros((8, 8), np.float32)
    for g in range(4):
        part = slice(2 * g, 2 * g + 2)
        wanted[part, part] = kernel[:, part]
    np.testing.assert_array_equal(full, wanted)
    np.testing.assert_array_equal(fmvit.regroup(full, 1, 4), kernel)


@pytest.mark.slow
def test_the_deployed_model_gives_the_same_with_fewer_parameters_and_no_batch_norm(small):
    """At a size that no step divides."""
    model, variables = small
    images = numbers(2, 37, 50, 3)
    deployed, fused = deploy(model, variables)
    names = str(jax.tree.map(jnp.shape, fused))
    assert "norm" not in names and "branch" not in names and set(fused) == {"params"}
    shapes = jax.eval_shape(deployed.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, fused) == jax.tree.map(jnp.shape, shapes)
    count = lambda tree: sum(p.size for p in jax.tree.leaves(tree))  # noqa: E731
    assert count(fused) < 0.75 * count(variables["params"])
    wanted = apply(model, variables, images, method="features")
    got = apply(deployed, fused, images, method="features")
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=1e-4 * np.abs(value).max(), err_msg=name)


# -------------------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_bands_and_what_is_left_sum_to_the_map(size):
    x = numbers(2, *size, 3)
    bands = frequency_bands(x)
    assert len(bands) == 3
    assert_trees_close(sum(bands), x, 1e-5)
    for band in bands[:2]:
        assert np.abs(band).max() > 0.1
    for band in frequency_bands(np.full((1, *size, 2), 3.0, np.float32))[:2]:
        np.testing.assert_allclose(band, 0.0, atol=1e-6)


def test_averages_at_the_border_are_of_what_is_inside():
    x = numbers(1, 5, 3, 1)
    got = np.asarray(average(x, 2))[0, ..., 0]
    wanted = [[x[0, i : i + 2, j : j + 2].mean() for j in (0, 2)] for i in (0, 2, 4)]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_attention_without_averaging_is_ordinary_attention():
    layer = fmvit.LightAttention(2, 1, deploy=True)
    x = numbers(2, 4, 6, 8)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    tokens = x.reshape(2, 24, 8)
    query, key, value = (
        (tokens @ params[n]["kernel"] + params[n]["bias"]).reshape(2, 24, 2, 4)
        for n in ("query", "key", "value")
    )
    y = kernels_pallas.attention(query, key, value).reshape(2, 24, 8)
    wanted = (y @ params["out"]["kernel"] + params["out"]["bias"]).reshape(x.shape)
    assert_trees_close(apply(layer, {"params": params}, x), wanted, 1e-5)


def test_averaged_keys_change_what_attention_gives():
    x = numbers(2, 4, 6, 8)
    layers = [fmvit.LightAttention(2, pool, deploy=True) for pool in (1, 2)]
    variables = jax.jit(layers[0].init)(jax.random.key(0), x)
    first, second = (apply(layer, variables, x) for layer in layers)
    assert np.abs(first - second).max() > 1e-3


def test_training_uses_the_batch_and_moves_every_statistic(small):
    model, variables = small
    run = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    _, new = run(variables, random_images(model))
    old, new = (jax.tree.leaves(v["batch_stats"]) for v in (variables, new))
    assert len(old) == len(new) > 0
    assert all(np.abs(a - b).max() > 0 for a, b in zip(old, new, strict=True))


def test_images_and_stages_that_do_not_fit_are_refused(small):
    model, variables = small
    with pytest.raises(ValueError, match=r"\(batch, height, width, 3\), not \(1, 32, 32, 1\)"):
        model.apply(variables, jnp.zeros((1, 32, 32, 1)))
    with pytest.raises(ValueError, match=r"have \[2, 3, 2, 2, 2\] entries"):
        model.clone(depths=(1, 1, 1)).apply(variables, jnp.zeros((1, 32, 32, 3)))
