import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.series import decompose, moving_average
from zoo.models.timeseries import ltsf_linear


def series(model, batch=2, key=0):
    return jax.random.normal(jax.random.key(key), model.example_inputs(batch)["series"].shape)


def small(name, **fields):
    return zoo.create(name, context_length=48, horizon=24, variates=3, **fields)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(ltsf_linear.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_nlinear_follows_a_shift_of_each_series():
    model = small("nlinear_336_96")
    variables, x = filled(model), series(model)
    shift = jnp.array([100.0, -3.0, 0.5])
    got = model.apply(variables, x + shift)
    np.testing.assert_allclose(got, model.apply(variables, x) + shift, atol=2e-4)


def test_linear_of_nothing_is_its_bias():
    model = small("ltsf_linear_336_96", individual=True)
    variables = filled(model)
    got = model.apply(variables, jnp.zeros_like(series(model)))
    bias = [variables["params"]["linear"][f"variate_{c}"]["bias"] for c in range(3)]
    np.testing.assert_array_equal(got[0], jnp.stack(bias, -1))


def test_dlinear_with_equal_parts_is_linear():
    model, linear = small("dlinear_336_96"), small("ltsf_linear_336_96")
    part = filled(linear)["params"]["linear"]
    free = {"shared": {**part["shared"], "bias": jnp.zeros_like(part["shared"]["bias"])}}
    x = series(model)
    got = model.apply({"params": {"season": part, "trend": free}}, x)
    np.testing.assert_allclose(got, linear.apply({"params": {"linear": part}}, x), atol=1e-5)


@pytest.mark.parametrize("name", ["ltsf_linear_336_96", "nlinear_336_96", "dlinear_336_96"])
def test_individual_weights_that_are_equal_are_shared_ones(name):
    shared, each = small(name), small(name, individual=True)
    variables, x = filled(shared), series(shared)
    copied = {
        part: {f"variate_{c}": weights["shared"] for c in range(3)}
        for part, weights in variables["params"].items()
    }
    got = each.apply({"params": copied}, x)
    np.testing.assert_allclose(got, shared.apply(variables, x), atol=1e-5)


def test_variates_of_an_individual_model_do_not_share():
    model = small("dlinear_336_96", individual=True)
    variables, x = filled(model), series(model)
    x = x.at[:, :, 1].set(x[:, :, 0])
    forecast = model.apply(variables, x)
    assert np.abs(forecast[:, :, 1] - forecast[:, :, 0]).max() > 0.1


def test_the_moving_average_of_a_constant_is_the_constant_up_to_the_ends():
    x = jnp.full((1, 40, 2), 3.5)
    np.testing.assert_allclose(moving_average(x, 25), x, rtol=1e-6)


def test_the_moving_average_repeats_the_ends():
    x = np.random.default_rng(0).standard_normal((2, 30, 3)).astype("f")
    padded = np.concatenate([x[:, :1]] * 12 + [x] + [x[:, -1:]] * 12, 1)
    wanted = np.stack([padded[:, t : t + 25].mean(1) for t in range(30)], 1)
    season, trend = decompose(jnp.asarray(x), 25)
    np.testing.assert_allclose(trend, wanted, atol=1e-6)
    np.testing.assert_allclose(season + trend, x, atol=1e-6)


def test_an_even_average_is_refused():
    with pytest.raises(ValueError, match="width 24 has no middle; choose an odd"):
        moving_average(jnp.zeros((1, 40, 1)), 24)


def test_a_classifier_reads_all_steps_of_all_variates_in_order_of_time():
    model = small("dlinear_336_96", num_classes=5)
    variables, x = filled(model), series(model)
    backbone = {"params": {n: p for n, p in variables["params"].items() if n != "head"}}
    y = zoo.create("dlinear_336_96", context_length=48, horizon=48, variates=3).apply(backbone, x)
    head = variables["params"]["head"]
    wanted = y.reshape(2, 48 * 3) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(model.apply(variables, x), wanted, atol=1e-4)
    state = zoo.export(model, variables)
    assert state["projection.weight"].shape == (5, 144)
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, state), variables)


def test_another_shape_is_refused():
    model = small("dlinear_336_96")
    with pytest.raises(ValueError, match=r"takes series of shape \(batch, 48, 3\), not \(1, 50, 3"):
        model.apply(filled(model), jnp.zeros((1, 50, 3)))


def test_it_learns_a_mix_of_periods():
    """Least squares is exact on it, and Adam comes near in 500 steps."""
    time = np.arange(600)
    data = np.sin(2 * np.pi * time / 24) + 0.5 * np.cos(2 * np.pi * time / 8)
    windows = np.lib.stride_tricks.sliding_window_view(data.astype("f"), 72)
    past, future = windows[:, :48], windows[:, 48:]
    solution = np.linalg.lstsq(past[:300], future[:300], rcond=None)[0]
    assert np.mean((past[300:] @ solution - future[300:]) ** 2) < 1e-6

    model = zoo.create("ltsf_linear_336_96", context_length=48, horizon=24, variates=1)
    x, y = jnp.asarray(past[..., None]), jnp.asarray(future[..., None])
    variables = model.init(jax.random.key(0), x[:1])
    optimizer = optax.adam(5e-3)

    def error(variables, x, y):
        return jnp.mean((model.apply(variables, x) - y) ** 2)

    @jax.jit
    def learn(variables):
        def step(carry, _):
            variables, state = carry
            updates, state = optimizer.update(jax.grad(error)(variables, x[:300], y[:300]), state)
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, (variables, optimizer.init(variables)), length=500)[0][0]

    assert error(learn(variables), x[300:], y[300:]) < 1e-2
