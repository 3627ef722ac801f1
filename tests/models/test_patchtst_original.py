import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.models.timeseries import patchtst_original


def run(model, variables, x):
    return jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, x)


@pytest.fixture(scope="module")
def small():
    model = zoo.create("original_patchtst_test")
    return model, filled(model), jax.random.normal(jax.random.key(0), (2, 24, 3))


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(patchtst_original.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_the_forecast_follows_shift_and_scale_and_reads_a_variate_alone(small):
    model, variables, x = small
    found = run(model, variables, x)["forecast"]
    moved = run(model, variables, x.at[..., 1].multiply(3).at[..., 1].add(5))["forecast"]
    np.testing.assert_allclose(moved[..., 1], 3 * found[..., 1] + 5, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(moved[..., ::2], found[..., ::2], rtol=1e-5, atol=1e-5)


def test_scores_are_handed_on_only_where_they_are_to_be(small):
    model, variables, x = small
    found = run(model, variables, x)
    alone = run(model.clone(residual_attention=False), variables, x)
    np.testing.assert_array_equal(found["layer0"], alone["layer0"])
    assert np.abs(found["layer1"] - alone["layer1"]).max() > 1e-3


def test_two_models_sum_trend_and_rest_and_go_through_their_file():
    model = zoo.create("original_patchtst_test", moving_average=5, individual=True, pad_end=False)
    variables = filled(model)
    x = jax.random.normal(jax.random.key(1), (2, 24, 3))
    found = run(model, variables, x)
    total = found["rest_forecast"] + found["trend_forecast"]
    np.testing.assert_array_equal(found["forecast"], total)
    assert found["rest_embed"].shape[2] == 5  # (24 - 8) / 4 + 1, nothing repeated
    state = zoo.export(model, variables)
    assert state["model_res.head.linears.2.weight"].shape == (12, 5 * 32)
    again = zoo.convert(model, state)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), again, variables)
    assert all(jax.tree.leaves(same))
