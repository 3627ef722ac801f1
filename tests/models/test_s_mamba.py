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
from zoo.checkpoints.rules import manifest
from zoo.models.timeseries import s_mamba
from zoo.models.timeseries.s_mamba import Mamba


def small(**fields):
    return zoo.create("s_mamba_test", time_features=0, **fields)


def normal(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(s_mamba.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def block(x, **fields):
    """A Mamba block with unit-scale weights: module, variables."""
    module = Mamba(**fields)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    return module, jax.tree.map(lambda p: p * 3 if p.ndim > 1 else p, variables)


def test_a_block_equals_its_recurrence():
    """Written out in float64, one token after the other."""
    x = normal(1, 9, 8)
    module, variables = block(x, state_size=3, conv_size=3)
    got = jax.jit(module.apply)(variables, x)[0][0]
    p = jax.tree.map(lambda t: np.asarray(t, np.float64), variables["params"])
    silu = lambda t: t / (1 + np.exp(-t))  # noqa: E731
    inputs = np.asarray(x[0], np.float64) @ p["in_proj"]["kernel"]
    gates = silu(np.asarray(x[0], np.float64) @ p["gate_proj"]["kernel"])
    taps, h, outputs = p["conv"]["kernel"][:, 0], np.zeros((16, 3)), []
    padded = np.concatenate([np.zeros((2, 16)), inputs])
    for i, gate in enumerate(gates):
        u = silu((taps * padded[i : i + 3]).sum(0) + p["conv"]["bias"])
        rank, B, C = np.split(u @ p["x_proj"]["kernel"], [1, 4])
        step = np.log1p(np.exp(rank @ p["dt_proj"]["kernel"] + p["dt_proj"]["bias"]))[:, None]
        h = np.exp(-step * np.exp(p["A_log"])) * h + step * u[:, None] * B
        outputs.append(((h @ C + p["D"] * u) * gate) @ p["out"]["kernel"])
    assert_trees_close(got, np.stack(outputs), 1e-5)


def test_a_block_goes_on_from_its_state_by_any_number_of_tokens():
    x = normal(2, 11, 16)
    module, variables = block(x, state_size=4)
    run = jax.jit(module.apply)
    whole, last = run(variables, x, module.init_state(2, 16))
    assert_trees_close(run(variables, x)[0], whole, 1e-6)
    state, parts = module.init_state(2, 16), []
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        y, state = run(variables, x[:, start:stop], state)
        parts.append(y)
    assert_trees_close(jnp.concatenate(parts, 1), whole, 1e-5)
    assert_trees_close(state, last, 1e-5)


def test_a_block_does_not_look_ahead():
    x = normal(1, 8, 16)
    module, variables = block(x, state_size=4)
    run = jax.jit(lambda x: module.apply(variables, x)[0])
    change = np.abs(run(x.at[:, 5].add(1.0)) - run(x))[0].max(-1)
    assert (change[:5] == 0).all() and (change[5:] > 1e-3).all()


def test_step_sizes_start_between_a_thousandth_and_a_tenth():
    bias = s_mamba.step_bias_init(jax.random.key(0), (1000,), jnp.float32)
    sizes = np.log10(jax.nn.softplus(bias))
    np.testing.assert_allclose([sizes.min(), sizes.mean(), sizes.max()], [-3, -2, -1], atol=0.1)


@pytest.fixture(scope="module")
def forecaster():
    """The small model, its variables with unit-scale weights, and it compiled."""
    model = small()
    return model, filled(model), jax.jit(model.apply)


def test_both_directions_are_alike(forecaster):
    """Reversing the variates and exchanging the two blocks of each layer reverses the forecast."""
    _, variables, run = forecaster
    x, params = normal(2, 24, 5), dict(variables["params"])
    for name in ("layers_0", "layers_1"):
        layer = params[name]
        params[name] = {**layer, "forward": layer["backward"], "backward": layer["forward"]}
    forecast = run(variables, x)
    assert_trees_close(run({"params": params}, x[:, :, ::-1])[:, :, ::-1], forecast, 1e-5)
    assert np.abs(run(variables, x[:, :, ::-1])[:, :, ::-1] - forecast).max() > 1e-2


def test_every_variate_sees_those_on_both_sides(forecaster):
    _, variables, run = forecaster
    x = normal(1, 24, 5)
    change = np.abs(run(variables, x.at[:, :, 2].set(normal(1, 24, key=1))) - run(variables, x))
    assert (change[0].max(0) > 1e-4).all()


def test_the_same_weights_forecast_another_number_of_variates(forecaster):
    model, variables, run = forecaster
    assert run(variables, normal(2, 24, 9)).shape == (2, 12, 9)
    with pytest.raises(ValueError, match=r"takes series of shape \(batch, 24, variates\), not"):
        model.apply(variables, normal(2, 25, 9))
    with pytest.raises(ValueError, match="takes no time_features; create it with time_features=4"):
        model.apply(variables, normal(2, 24, 5), normal(2, 24, 4))


def test_the_forecast_follows_scale_and_shift_of_each_series(forecaster):
    _, variables, run = forecaster
    x = normal(2, 24, 5)
    scale, shift = jnp.array([0.5, 3, 10, 1, 2]), jnp.array([1.0, -5, 0, 100, 3])
    wanted = scale * run(variables, x) + shift
    np.testing.assert_allclose(run(variables, scale * x + shift), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_it_learns_one_series_from_another():
    errors, alone = learn_one_series_from_another(
        small(variates=2, standardise=False, depth=1, dropout=0.0), steps=400
    )
    assert errors[1] < 0.1 < 0.8 < errors[0] and alone > 0.8


def test_what_the_official_code_never_calls_is_dropped_and_may_be_written_as_zeros():
    name = "s_mamba_ettm1_96_192"
    model, layouts = zoo.create(name), s_mamba.LAYOUTS
    count = lambda shapes: sum(int(np.prod(x.shape)) for x in shapes.values())  # noqa: E731
    assert count(manifest(layouts, model, "official")) == zoo.info(name).params == 314_944
    assert count(manifest(layouts, model, "unused_too")) == 319_872

    model = small()
    variables = filled(model)
    state = zoo.export(model, variables, "unused_too")
    unused = {key for key in state if key.split(".")[3:4] in (["man"], ["man2"], ["a"])}
    assert len(unused) == 2 * (9 + 9 + 8) and not any(state[key].any() for key in unused)
    noise = np.random.default_rng(0)
    state |= {key: noise.normal(size=state[key].shape).astype("f") for key in unused}
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, state), variables)
    assert zoo.export(model, variables).keys() == state.keys() - unused
