import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    learn_one_series_from_another,
)

import zoo
from zoo.models.timeseries import gateformer


def normal(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(gateformer.__doc__)
    assert feature_shapes(zoo.create(name)) == table


@pytest.fixture(scope="module")
def forecaster():
    """The small model, its variables with unit-scale weights, and its features compiled."""
    model = zoo.create("gateformer_test")
    run = jax.jit(lambda variables, x: model.apply(variables, x, method="features"))
    return model, filled(model), run


def test_variates_have_no_order(forecaster):
    _, variables, run = forecaster
    x, order = normal(2, 24, 5), np.array([3, 0, 4, 2, 1])
    forecast = run(variables, x)["forecast"]
    assert_trees_close(run(variables, x[:, :, order])["forecast"], forecast[:, :, order], 1e-5)
    assert np.abs(forecast - forecast[:, :, order]).max() > 0.1


def test_series_meet_in_the_attention_over_variates_alone(forecaster):
    _, variables, run = forecaster
    x = normal(1, 24, 5)
    other = run(variables, x.at[:, :, 2].set(normal(1, 24, key=1)))
    for name, y in run(variables, x).items():
        change = np.abs(other[name] - y)
        change = change[0].max(0) if name == "forecast" else change[0].reshape(5, -1).max(1)
        own = np.arange(5) == 2
        meets = name in ("variate", "gate2", "forecast")
        assert ((change > 1e-4) == (own | meets)).all(), name


def gated(variables, name, bias):
    """The same with a gate that is sigmoid(bias) for all inputs."""
    params = dict(variables["params"])
    params[name] = jax.tree.map(jnp.zeros_like, params[name])
    params[name]["first"]["bias"] += bias
    return {"params": params}


def test_the_first_gate_chooses_between_the_series_as_a_whole_and_its_course(forecaster):
    _, variables, run = forecaster
    x = normal(2, 24, 5)
    for bias, (kept, lost) in ((30, ("embed", "readout")), (-30, ("readout", "embed"))):
        start = gated(variables, "gate1", bias)
        forecast = run(start, x)["forecast"]

        def without(part, start=start):
            zeros = jax.tree.map(jnp.zeros_like, start["params"][part])
            return run({"params": {**start["params"], part: zeros}}, x)["forecast"]

        np.testing.assert_array_equal(without(lost), forecast)
        assert np.abs(without(kept) - forecast).max() > 1e-2


def test_the_second_gate_can_shut_the_other_variates_out(forecaster):
    _, variables, run = forecaster
    variables, x = gated(variables, "gate2", 30), normal(1, 24, 5)
    other = run(variables, x.at[:, :, 2].set(normal(1, 24, key=1)))["forecast"]
    change = np.abs(other - run(variables, x)["forecast"])[0].max(0)
    assert (change[[0, 1, 3, 4]] == 0).all() and change[2] > 1e-2


def test_the_forecast_follows_scale_and_shift_of_each_series(forecaster):
    _, variables, run = forecaster
    x = normal(2, 24, 5)
    scale, shift = jnp.array([0.5, 3, 10, 1, 2]), jnp.array([1.0, -5, 0, 100, 3])
    wanted = scale * run(variables, x)["forecast"] + shift
    got = run(variables, scale * x + shift)["forecast"]
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_the_same_weights_forecast_another_number_of_variates(forecaster):
    model, variables, run = forecaster
    assert run(variables, normal(2, 24, 9))["forecast"].shape == (2, 12, 9)
    with pytest.raises(ValueError, match=r"takes series of shape \(batch, 24, variates\), not"):
        model.apply(variables, normal(2, 25, 9))


@pytest.mark.slow
def test_it_learns_one_series_from_another():
    """Not as well as one that does not standardise: the scale of the first is gone."""
    errors, alone = learn_one_series_from_another(
        zoo.create("gateformer_test", variates=2, dropout=0.0)
    )
    assert errors[1] < 0.5 < 0.8 < errors[0] and alone > 0.8
