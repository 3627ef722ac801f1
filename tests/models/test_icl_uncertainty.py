import jax
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.models.incontext import icl_uncertainty
from zoo.models.incontext.icl_uncertainty import gaussian_loss


def prompts(batch=2, points=9, dims=3, scale=1.0):
    rng = np.random.default_rng(0)
    xs, ys = rng.standard_normal((batch, points, dims)), rng.standard_normal((batch, points))
    return (scale * xs).astype("f"), (scale * ys).astype("f")


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(icl_uncertainty.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


def test_the_loss_is_least_at_the_root_of_the_mean_square():
    errors = np.random.default_rng(0).standard_normal(500) * 0.3
    grid = np.linspace(-3, 1, 2001)
    prediction = np.stack([np.zeros((2001, 500)), np.repeat(grid[:, None], 500, 1)], -1)
    losses = gaussian_loss(prediction, errors).mean(1)
    best = np.exp(grid[np.argmin(losses)])
    np.testing.assert_allclose(best, np.sqrt((errors**2).mean()), rtol=0.005)


def test_deviations_are_positive_and_finite_far_away():
    model = zoo.create("icl_uncertainty_test")
    variables = jax.tree.map(lambda x: 100 * x, filled(model))
    run = jax.jit(lambda v, *x: model.apply(v, *x, method="features"))
    out = run(variables, *prompts(scale=100.0))
    spread = np.asarray(out["log_deviation"])
    assert np.abs(spread).max() == icl_uncertainty.LIMIT
    assert np.isfinite(gaussian_loss(out["prediction"], prompts(scale=100.0)[1])).all()


def test_without_positions_prompts_may_be_longer():
    model = zoo.create("icl_uncertainty_test", positions=False)
    assert jax.eval_shape(model.apply, filled(model), *prompts(points=30)).shape == (2, 30, 2)
    model = zoo.create("icl_uncertainty_test")
    with pytest.raises(ValueError, match="reads at most 9 points, not 30"):
        jax.eval_shape(model.init, jax.random.key(0), *prompts(points=30))


def test_mean_and_deviation_stand_side_by_side():
    model = zoo.create("icl_uncertainty_test")
    run = jax.jit(lambda v, *x: model.apply(v, *x, method="features"))
    out = run(filled(model), *prompts())
    both = np.stack([out["mean"], out["log_deviation"]], -1)
    np.testing.assert_array_equal(out["prediction"], both)
