import jax
import numpy as np
import pytest
from model_helpers import filled, program_of
from sklearn.metrics import log_loss

import zoo
from zoo.data import Arrays, Data
from zoo.evaluators import ActivationMaps
from zoo.evaluators.activation_maps import (
    class_activation_map,
    draw_activation,
    weighted_log_loss,
)
from zoo.tasks import Classification


@pytest.fixture(scope="module")
def network():
    model = zoo.create("t2_test")
    rng = np.random.default_rng(0)
    arrays = {
        "series": rng.standard_normal((10, 12, 3)).astype("f"),
        "aux": rng.standard_normal((10, 2)).astype("f"),
        "label": np.arange(10) % 5,
    }
    return model, filled(model), arrays


def test_the_map_of_features_and_weights_is_the_models_own(network):
    model, variables, arrays = network
    run = jax.jit(lambda v, x, z: model.apply(v, x, z, method="features"))
    out = run(variables, arrays["series"], arrays["aux"])
    head = variables["params"]["head"]
    got = class_activation_map(out[f"block{model.depth}"], head["kernel"])
    np.testing.assert_allclose(got, out["activation"], atol=1e-5)
    np.testing.assert_allclose(got.mean(1) + head["bias"], out["logits"], atol=1e-5)


def test_every_class_counts_the_same_in_the_weighted_loss():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 90)
    labels = np.resize([0, 0, 0, 1], 90)
    parts = [log_loss(labels[labels == c], probabilities[labels == c], labels=[0, 1, 2])
             for c in (0, 1)]  # fmt: skip
    assert weighted_log_loss(probabilities, labels) == pytest.approx(np.mean(parts))
    sure = np.array([[1.0, 0.0], [1.0, 0.0]])
    wanted = -(np.log(1 - 1e-15) + np.log(1e-15)) / 2
    assert weighted_log_loss(sure, np.array([0, 1])) == pytest.approx(wanted)


def test_a_map_is_drawn_from_zero_to_one_behind_its_series():
    series = np.random.default_rng(0).standard_normal((12, 3))
    activation = np.linspace(-2, 6, 14)
    figure = draw_activation(series, activation, "abc", ("redshift", "its error"))
    (axes,) = figure.axes
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array()[0], np.linspace(0, 1, 14))
    assert [line.get_label() for line in axes.lines[:3]] == ["a", "b", "c"]
    again = draw_activation(series, np.zeros(12), axes=figure.add_subplot())
    assert again is figure and not figure.axes[1].images[0].get_array().any()
    with pytest.raises(ValueError, match="14 steps and the series 12; name the 2 others with ext"):
        draw_activation(series, activation)


def test_the_evaluator_draws_maps(network, tmp_path):
    model, variables, arrays = network
    maps = ActivationMaps(classes=("one", "two"), variates=("a", "b", "c"))
    data = Data(*[Arrays(**arrays)] * 2, eval_batch_size=4)
    found = maps.run(program_of(model, Classification()), variables, data, tmp_path)
    assert found["weighted_log_loss"] > 0
    assert (tmp_path / "activation_maps.png").stat().st_size > 1000
