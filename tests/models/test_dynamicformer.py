import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.data import Data, eval_batches
from zoo.data.intersection import IntersectionNumbers, airy_b
from zoo.models.signal import dynamicformer
from zoo.models.signal.dynamic_mlp import away_from_zero, dra, package_dra
from zoo.models.signal.dynamicformer import DistanceBias, alignment, pool, unit_groups


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(dynamicformer.__doc__)
    assert feature_shapes(zoo.create(name)) == table


@functools.cache
def network():
    """A small model, weights, and numbers of genus 2 with some marked points."""
    model = zoo.create("dynamicformer_test", rows=26)
    source = IntersectionNumbers((2,), 3, 26)
    batch = next(eval_batches(Data(source, source, eval_batch_size=len(source))))
    x = {k: batch[k][[0, 3, 5, 8]] for k in ("exponents", "sizes", "airy")}
    x["exponents"] = np.pad(x["exponents"], ((0, 0), (0, 1)))
    return model, filled(model), x


@functools.partial(jax.jit, static_argnums=0)
def features(model, variables, x):
    return model.apply(variables, **x, method="features")


def test_the_order_of_the_points_and_what_is_behind_them_do_not_matter():
    model, variables, x = network()
    wanted = features(model, variables, x)
    n = x["sizes"][:, 1].astype(int)
    turned = [np.concatenate([d[:k][::-1], d[k:]]) for d, k in zip(x["exponents"], n, strict=True)]
    assert np.any(np.stack(turned) != x["exponents"])
    got = features(model, variables, {**x, "exponents": np.stack(turned)})
    scale = np.abs(wanted["logits"]).max()
    np.testing.assert_allclose(got["logits"], wanted["logits"], atol=1e-5 * scale)
    # padding is pooled, but no point attends to it
    behind = np.arange(4) >= n[:, None]
    other = features(model, variables, {**x, "exponents": np.where(behind, 7, x["exponents"])})
    assert np.abs(other["points"] - wanted["points"])[behind].max() > 0.1
    np.testing.assert_allclose(other["points"][~behind], wanted["points"][~behind], atol=1e-5)


def test_rows_know_their_distance_and_padding_is_unseen():
    model, variables, x = network()
    count = len(airy_b(4))  # of the first example: genus 2, one point
    assert (x["airy"][0, :count, 3] > 0).all() and not x["airy"][0, count:].any()
    wanted = features(model, variables, x)
    order = np.r_[np.arange(count)[::-1], np.arange(count, 26)]
    turned = features(model, variables, {**x, "airy": x["airy"][:, order]})
    assert np.abs(turned["rows"][0] - wanted["rows"][0, order]).max() > 0.01
    numbers = x["airy"].copy()
    numbers[0, count:, :3] = 5.0  # a value of 0 is padding, whatever is before it
    again = features(model, variables, {**x, "airy": numbers})
    np.testing.assert_array_equal(again["logits"], wanted["logits"])


def test_the_bias_is_a_function_of_signed_distance():
    bias = DistanceBias(8, 2)
    variables = bias.init(jax.random.key(0), 7)
    table = bias.apply(variables, 7)[0]
    for offset in range(-6, 7):
        line = np.diagonal(table, offset, axis1=1, axis2=2)
        np.testing.assert_array_equal(line, np.broadcast_to(line[:, :1], line.shape))
    assert np.abs(table - table.swapaxes(1, 2)).max() > 0.1


def test_the_activation_is_the_identity_without_its_waves():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_array_equal(dra(x, 0.0, 1.0, 0.0, 0.0), x)
    np.testing.assert_allclose(dra(x, 2.0, 0.5, 0.0, 0.0), x + 4 * np.sin(2 * x) ** 2, rtol=1e-6)
    step = dra(x, 2.0, 0.5, 0.3, 0.0) - dra(x, 2.0, 0.5, 0.0, 0.0)
    np.testing.assert_allclose(step, 0.3 * np.cos(0.5 * x), atol=1e-6)
    swapped = package_dra(x, 2.0, 0.5, 0.0, 0.0)
    np.testing.assert_allclose(swapped, x + 0.25 * np.sin(2 * x) ** 2, rtol=1e-6)
    starts = away_from_zero(jax.random.key(0), (4000,))
    assert np.abs(starts).min() >= np.float32(0.1) and 0.45 < (starts > 0).mean() < 0.55


def test_the_pool_scales_by_the_size_of_the_set():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3))
    out = pool(x, jnp.array([9.0])).reshape(2, 3, 4, 3)
    np.testing.assert_allclose(out[..., 1], out[..., 0], rtol=1e-6)  # as many rows as is typical
    np.testing.assert_allclose(out[:, :, 3, 0], np.std(x, 1, ddof=1), rtol=1e-5)
    few = pool(x, jnp.array([99.0])).reshape(2, 3, 4, 3)
    np.testing.assert_allclose(few[..., 1], out[..., 0] / 2, rtol=1e-5)  # log 10 / log 100
    np.testing.assert_allclose(few[..., 2], out[..., 0] * 2, rtol=1e-5)


def test_alignment_is_zero_for_the_same_uncorrelated_features():
    x = jnp.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert alignment(x, x) == 0
    assert alignment(x, -x) == 8  # (-1 - 1)^2 twice
    assert alignment(x, x[:, ::-1]) == 2 + 0.5 * 2


def test_groups_of_channels_are_normalised():
    x = unit_groups(jax.random.normal(jax.random.key(0), (3, 12)) * 100, 3)
    np.testing.assert_allclose((x.reshape(3, 3, 4) ** 2).sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(unit_groups(jnp.zeros((1, 4)), 2), 0)


def test_other_sizes_are_refused():
    model, _, x = network()
    with pytest.raises(ValueError, match=r"takes airy of shape \(4, 26, 4\), not \(4, 25, 4\)"):
        model.init(jax.random.key(0), **{**x, "airy": x["airy"][:, 1:]})
