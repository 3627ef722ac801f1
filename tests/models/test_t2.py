import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import apply, documented_shapes, feature_shapes, filled

import zoo
from zoo.data.light_curves import around_detections, fit, interpolate, unfitted
from zoo.models.timeseries import t2
from zoo.models.timeseries.t2 import append_channels, append_steps


def inputs(model, batch=3, key=0):
    keys = jax.random.split(jax.random.key(key), len(model.example_inputs()))
    shapes = model.example_inputs(batch).values()
    return [jax.random.normal(k, spec.shape) for k, spec in zip(keys, shapes, strict=True)]


def features(model, variables, x):
    return jax.jit(lambda v, x: model.apply(v, *x, method="features"))(variables, x)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(t2.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_the_mean_of_the_class_activation_map_is_the_logit():
    model = zoo.create("t2_test")
    variables = filled(model)
    out = features(model, variables, inputs(model))
    bias = variables["params"]["head"]["bias"]
    np.testing.assert_allclose(out["activation"].mean(1) + bias, out["logits"], atol=1e-5)


def test_the_redshift_becomes_two_times_of_the_pair_over_and_over():
    series, aux = jnp.zeros((1, 4, 6)), jnp.array([[0.5, 0.1]])
    steps = append_steps(series, aux)
    assert steps.shape == (1, 6, 6)
    np.testing.assert_allclose(steps[0, 4:], [[0.5, 0.1] * 3] * 2)
    channels = append_channels(series, aux)
    assert channels.shape == (1, 4, 8)
    np.testing.assert_allclose(channels[0, :, 6:], [[0.5, 0.1]] * 4)


def test_permuted_bands_are_permuted_rows_of_the_embedding():
    model = zoo.create("t2_test", aux_features=0)
    variables, (series,) = filled(model), inputs(model)
    order = np.array([2, 0, 1])
    params = dict(variables["params"])
    params["embed"] = {**params["embed"], "kernel": params["embed"]["kernel"][order]}
    got = apply(model, {"params": params}, series[..., order])
    np.testing.assert_allclose(got, apply(model, variables, series), atol=1e-5)


def test_the_order_of_the_times_matters():
    model = zoo.create("t2_test", aux_features=0)
    variables, (series,) = filled(model), inputs(model)
    changed = apply(model, variables, series[:, ::-1]) - apply(model, variables, series)
    assert np.abs(changed).max() > 0.01


@pytest.mark.parametrize(
    "fields, aux, sentence",
    [
        ({}, None, r"takes aux of shape \(3, 2\), not None"),
        ({"aux_features": 0}, np.zeros((3, 2)), r"not \(3, 2\); create it with aux_features=2"),
        ({"add_aux_to": "L"}, np.zeros((3, 2)), "add_aux_to='L'; choose steps or channels"),
    ],
)
def test_what_it_cannot_take_is_refused(fields, aux, sentence):
    model = zoo.create("t2_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        model.init(jax.random.key(0), jnp.zeros((3, 12, 3)), aux)


# ------------------------------------------------------------------------- light curves


def curve():
    """A bump in two bands, seen at 40 irregular times."""
    rng = np.random.default_rng(0)
    days = np.sort(rng.uniform(0, 80, 40))
    band = np.resize([4802.0, 6231.0], 40)
    flux = 100 * np.exp(-0.5 * ((days - 40) / 12) ** 2)
    return np.stack([days, band], -1), flux + rng.standard_normal(40), np.ones(40)


def test_the_process_finds_the_curve_between_its_observations():
    process = fit(*curve())
    found = interpolate(process, [4802.0, 6231.0])
    times = np.linspace(*process.points[[0, -1], 0], 100)
    truth = 100 * np.exp(-0.5 * ((times - 40) / 12) ** 2)
    assert found.shape == (100, 2)
    assert np.abs(found - truth[:, None]).mean() < 2
    assert process.log_likelihood() > unfitted(*curve()).log_likelihood()


def test_far_from_observations_it_knows_nothing():
    process = fit(*curve())
    mean, deviation = process.predict(np.array([[1e6, 4802.0]]))
    assert mean[0] == 0
    np.testing.assert_allclose(deviation[0], np.exp(process.parameters[0] / 2))


def test_observations_are_cut_around_the_detections():
    days = np.array([0.0, 60, 100, 120, 160, 200])
    detected = np.array([0, 0, 1, 1, 0, 0], bool)
    np.testing.assert_array_equal(around_detections(days, detected), [0, 1, 1, 1, 1, 0])
    with pytest.raises(ValueError, match="No observation of this light curve is a detection"):
        around_detections(days, np.zeros(6, bool))


def test_a_curve_without_a_flux_is_refused():
    with pytest.raises(ValueError, match="2 observations, none with a flux"):
        fit(np.zeros((2, 2)), np.zeros(2), np.ones(2))
