import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.series import decompose
from zoo.models.timeseries import autoformer
from zoo.models.timeseries.autoformer import (
    auto_correlation,
    choose_delays,
    circular_correlation,
    fit_length,
    kept,
)


def series(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def inputs(model, batch=2):
    return {
        name: series(*spec.shape, key=i)
        for i, (name, spec) in enumerate(model.example_inputs(batch).items())
    }


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(autoformer.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_the_spectrum_gives_the_correlation_at_every_delay():
    """In float64, against the sum that defines it."""
    x, y = np.random.default_rng(0).standard_normal((2, 3, 21, 2, 4))
    with jax.enable_x64():
        got = np.asarray(circular_correlation(jnp.asarray(x), jnp.asarray(y)))
    wanted = np.stack([(x * np.roll(y, delay, axis=1)).sum(1) for delay in range(21)], axis=1)
    np.testing.assert_allclose(got, wanted, atol=1e-9)


def test_the_spectrum_of_an_odd_length_can_be_taken_for_that_of_one_less():
    """As Time-Series-Library does; an even length is the same either way."""
    x, y = series(2, 21, 2, 4), series(2, 21, 2, 4, key=1)
    assert circular_correlation(x, y, even=True).shape == (2, 20, 2, 4)
    assert auto_correlation(x, y, y, 9, False, even=True).shape == x.shape
    x, y = x[:, :20], y[:, :20]
    np.testing.assert_array_equal(circular_correlation(x, y, even=True), circular_correlation(x, y))


def test_delays_follow_the_logarithm_of_the_length():
    assert [kept(length, 3) for length in (96, 144)] == [13, 14]
    assert kept(20, 7) == kept(20, 99) == 20


def test_a_periodic_series_is_shifted_by_its_period_and_stays_as_it_is():
    wave = jnp.tile(series(2, 8, 2, 4), (1, 8, 1, 1))  # period 8, 64 steps
    correlation = circular_correlation(wave, wave).mean((2, 3))
    weights, delays = choose_delays(correlation, 8, together=False)
    assert np.all(delays % 8 == 0) and len(set(delays[0].tolist())) == 8
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    value = jnp.tile(series(2, 8, 2, 4, key=1), (1, 8, 1, 1))
    for together in (True, False):
        got = jax.jit(auto_correlation, static_argnums=(3, 4))(wave, wave, value, 2, together)
        np.testing.assert_allclose(got, value, atol=2e-5)


def test_values_are_read_a_delay_later():
    """The query is the key 5 steps later, so y_t = v_(t + delay) with one delay of 21 - 5."""
    key, value = series(1, 21, 1, 32), series(1, 21, 1, 32, key=1)
    query = jnp.roll(key, -5, axis=1)
    weights, delays = choose_delays(circular_correlation(query, key).mean((2, 3)), 1, False)
    assert delays.tolist() == [[16]] and weights.tolist() == [[1.0]]
    spikes = jnp.zeros((1, 21, 1, 1)).at[0, 16].set(1.0)
    np.testing.assert_allclose(
        circular_correlation(value, spikes), jnp.roll(value, -16, axis=1), atol=1e-5
    )


def test_a_batch_has_one_set_of_delays_in_training_and_each_example_its_own_after():
    correlation = series(4, 24)
    weights, shared = choose_delays(correlation, 6, together=True)
    assert np.all(shared == shared[0])
    assert set(shared[0].tolist()) == set(np.argsort(-correlation.mean(0))[:6].tolist())
    found = np.take_along_axis(np.asarray(correlation), np.asarray(shared), 1)
    np.testing.assert_allclose(weights, jax.nn.softmax(found), rtol=1e-6)
    for i, row in enumerate(choose_delays(correlation, 6, together=False)[1].tolist()):
        assert set(row) == set(np.argsort(-correlation[i])[:6].tolist())
    alone = [choose_delays(correlation[:1], 6, together) for together in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, *alone)


@pytest.mark.slow
def test_training_and_inference_agree_on_one_example_and_differ_on_a_batch():
    model = zoo.create("autoformer_test", factor=1, dropout=0.0)
    variables = filled(model)
    run = jax.jit(lambda x, train: model.apply(variables, **x, train=train), static_argnums=1)
    x = inputs(model)
    one = {name: value[:1] for name, value in x.items()}
    np.testing.assert_allclose(run(one, True), run(one, False), atol=1e-5)
    assert np.abs(run(x, True) - run(x, False)).max() > 1e-2
    cases = [golden.Case.read(golden.FOLDER / "autoformer" / f"tiny_{mode}.npz").references["pred"]
             for mode in ("eval", "train")]  # fmt: skip
    assert np.abs(cases[0] - cases[1]).max() > 0.1


def test_a_memory_is_cut_or_continued_with_zeros():
    x = series(1, 6, 1, 2)
    np.testing.assert_array_equal(fit_length(x, 4), x[:, :4])
    longer = fit_length(x, 9)
    np.testing.assert_array_equal(longer[:, :6], x)
    assert longer.shape == (1, 9, 1, 2) and not longer[:, 6:].any()


def test_season_and_trend_sum_to_the_series():
    x = series(2, 30, 3)
    season, trend = decompose(x, 25)
    np.testing.assert_allclose(season + trend, x, atol=1e-6)
    season, trend = decompose(jnp.full((1, 30, 1), 7.0), 25)
    np.testing.assert_allclose(season, 0, atol=1e-5)
    np.testing.assert_allclose(trend, 7, rtol=1e-6)


def test_a_level_moves_the_forecast_with_its_trend_alone():
    """With no season read out, the trend of the decoder's start is all there is."""
    model = zoo.create("autoformer_test")
    variables = jax.tree.map(jnp.zeros_like, filled(model))
    x = inputs(model)
    forecast = jax.jit(lambda x: model.apply(variables, **x))(x)
    mean = jnp.broadcast_to(x["series"].mean(1, keepdims=True), forecast.shape)
    np.testing.assert_allclose(forecast, mean, atol=1e-6)


def test_the_encoder_alone_reconstructs_and_classifies():
    model = zoo.create("autoformer_test", decoder_depth=0, time_features=0, horizon=20)
    variables, x = filled(model), series(2, 20, 3)
    assert jax.jit(model.apply)(variables, x).shape == (2, 20, 3)
    assert not any("decoder" in name for name in variables["params"])
    state = zoo.export(model, variables, "encoder")
    assert state["projection.weight"].shape == (3, 32) and not any("dec" in n[:3] for n in state)
    again = zoo.convert(model, state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    model = zoo.create("autoformer_test", num_classes=4, time_features=0, masked=True)
    variables = filled(model)
    run = jax.jit(lambda mask: model.apply(variables, x, mask=mask))
    mask = jnp.arange(20) < jnp.array([[20], [12]])
    assert variables["params"]["head"]["kernel"].shape == (20 * 32, 4)
    assert np.abs(run(mask) - run(mask | True))[0].max() == 0
    assert np.abs(run(mask) - run(mask | True))[1].max() > 1e-3


def test_what_does_not_fit_is_refused():
    x, key = series(1, 20, 3), jax.random.key(0)
    with pytest.raises(
        ValueError, match=r"takes time_features of shape \(batch, 20, 4\), not None; give"
    ):
        zoo.create("autoformer_test").init(key, x)
    with pytest.raises(ValueError, match=r"takes future_time_features of shape \(batch, 10, 4\)"):
        zoo.create("autoformer_test").init(key, x, series(1, 20, 4))
    with pytest.raises(ValueError, match="takes no future_time_features; create it with time"):
        zoo.create("autoformer_test", num_classes=2).init(
            key, x, series(1, 20, 4), series(1, 10, 4)
        )
    with pytest.raises(ValueError, match="reconstructs the context of 20 steps, and horizon=10"):
        zoo.create("autoformer_test", decoder_depth=0, time_features=0).init(key, x)
    with pytest.raises(ValueError, match=r"takes a mask of shape \(1, 20\), not None"):
        zoo.create("autoformer_test", num_classes=2, time_features=0, masked=True).init(key, x)
    with pytest.raises(ValueError, match="width 4 has no middle; choose an odd width"):
        decompose(x, 4)
