import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.series import standardise
from zoo.models.timeseries import patchtst


def series(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def apply(model, variables, *inputs):
    return jax.jit(model.apply)(variables, *inputs)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(patchtst.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_patches_overlap_by_half_and_the_last_repeats_the_end():
    found = patchtst.patches(jnp.arange(96.0)[None, None], 16, 8)[0, 0]
    assert found.shape == (12, 16) == (patchtst.patch_count(96, 16, 8), 16)
    for i in range(11):
        np.testing.assert_array_equal(found[i], np.arange(8 * i, 8 * i + 16))
    np.testing.assert_array_equal(found[11], [*range(88, 96), *[95] * 8])
    assert patchtst.patches(jnp.zeros((1, 1, 29)), 16, 8).shape[2] == 3  # JapaneseVowels
    with pytest.raises(ValueError, match="series of 12 steps holds no patch of 16; choose"):
        zoo.create("patchtst_etth1_96_96", context_length=12).init(
            jax.random.key(0), series(1, 12, 7)
        )


def test_a_variate_is_read_alone_by_the_weights_of_all():
    model = zoo.create("patchtst_test")
    variables, x = filled(model), series(2, 24, 5)
    forecast = apply(model, variables, x)
    assert forecast.shape == (2, 12, 5)
    for v in (0, 3):
        alone = apply(model, variables, x[:, :, v : v + 1])
        np.testing.assert_allclose(forecast[:, :, v : v + 1], alone, atol=1e-5)
    assert np.abs(forecast[..., 0] - forecast[..., 1]).max() > 0.1


def test_the_forecast_follows_scale_and_shift_of_each_series():
    model = zoo.create("patchtst_test")
    variables, x = filled(model), series(2, 24, 3)
    scale, shift = jnp.array([0.5, 3, 10]), jnp.array([1.0, -5, 100])
    wanted = scale * apply(model, variables, x) + shift
    got = apply(model, variables, scale * x + shift)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_an_imputer_sees_neither_hidden_values_nor_counts_them():
    model = zoo.create("patchtst_test", horizon=24, masked=True)
    variables, x = filled(model), series(2, 24, 3) + 5
    mask = (series(2, 24, 3, key=1) > -0.5).at[1, :, 2].set(False)
    run = jax.jit(model.apply)
    got = run(variables, jnp.where(mask, x, 0), mask)
    np.testing.assert_array_equal(got, run(variables, jnp.where(mask, x, 99.0), mask))
    assert np.isfinite(got).all()  # of one series nothing was seen
    scaled, mean, deviation = standardise(x, mask)
    seen = np.asarray(x[0, :, 0])[np.asarray(mask[0, :, 0])]
    assert mean[0, 0, 0] == pytest.approx(seen.mean(), rel=1e-5)
    assert deviation[0, 0, 0] == pytest.approx(seen.std(), rel=1e-4)
    assert np.all(scaled[~mask] == 0)


def test_a_mask_that_does_not_fit_is_refused():
    x = series(1, 24, 3)
    with pytest.raises(ValueError, match=r"takes a mask of shape \(1, 24, 3\), not None; give"):
        zoo.create("patchtst_test", masked=True).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="takes no mask; create it with masked=True"):
        zoo.create("patchtst_test").init(jax.random.key(0), x, x > 0)


def test_official_names_of_both_heads_come_back():
    classifier = zoo.create("patchtst_test", num_classes=4)
    variables = filled(classifier)
    state = zoo.export(classifier, variables, "classifier")
    assert state["projection.weight"].shape == (4, 3 * 32 * 6)
    again = zoo.convert(classifier, state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert "head.linear.weight" in zoo.export("patchtst_test", filled(zoo.create("patchtst_test")))
