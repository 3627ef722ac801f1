import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.language import mamba2


def tokens(batch=2, length=37, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


@pytest.fixture(scope="module", params=[(), (1,)], ids=["pure", "hybrid"])
def small(request):
    """A small Mamba-2 with unit-scale weights, without or with attention; its compiled call."""
    model = zoo.create("mamba2_test", attention_layers=request.param)
    return model, filled(model), jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(mamba2.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


def test_steps_and_pieces_equal_the_whole_sequence(small):
    model, variables, call = small
    x = tokens()
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, pieces = model.init_state(2, 37), []
    for start, end in ((0, 1), (1, 18), (18, 35), (35, 36), (36, 37)):
        state, out = step(variables, state, x[:, start:end])
        pieces.append(out)
    assert_trees_close(jnp.concatenate(pieces, axis=1), call(variables, x), 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_state(small, side):
    model, variables, call = small
    x, more, count = tokens(2, 20), tokens(2, 2, seed=1), np.array([[20], [9]])
    mask = np.arange(20) < count if side == "right" else np.arange(20) >= 20 - count
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, out = step(variables, model.init_state(2, 22), x, mask)
    _, after = step(variables, state, more)
    alone = call(variables, np.concatenate([x[1][mask[1]], more[1]])[None])[0]
    assert_trees_close(np.concatenate([out[1][mask[1]], after[1]]), alone, 2e-5)


def test_the_recurrence_is_the_papers():
    """One layer's state space, token by token in NumPy."""
    mixer = mamba2.StateSpace(state_size=3, head_dim=4, groups=2, expand=2, wide_skip=True)
    u = jax.random.normal(jax.random.key(0), (1, 9, 8))
    params = mixer.init(jax.random.key(1), u)["params"]
    params["D"] = jax.random.normal(jax.random.key(2), params["D"].shape)
    got, _ = mixer.apply({"params": params}, u)
    p = jax.tree.map(lambda t: np.asarray(t, np.float64), params)
    silu = lambda t: t / (1 + np.exp(-t))  # noqa: E731
    z, xBC, dt = np.split(np.asarray(u[0], float) @ p["in_proj"]["kernel"], [16, 44], axis=-1)
    padded = np.concatenate([np.zeros((3, 28)), xBC])
    taps = p["conv"]["kernel"][:, 0]
    xBC = silu(sum(taps[j] * padded[j : j + 9] for j in range(4)) + p["conv"]["bias"])
    x, B, C = np.split(xBC, [16, 22], axis=-1)
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    y = np.zeros((9, 16))
    for head in range(4):
        channels, group = slice(4 * head, 4 * head + 4), slice(3 * (head // 2), 3 * (head // 2) + 3)
        state = np.zeros((3, 4))
        for t in range(9):
            state *= np.exp(-np.exp(p["A_log"][head]) * dt[t, head])
            state += np.outer(B[t, group], dt[t, head] * x[t, channels])
            y[t, channels] = C[t, group] @ state
    y = (y + p["D"] * x) * silu(z)
    parts = y.reshape(9, 2, 8)
    y = (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)).reshape(9, 16)
    assert_trees_close(got[0], y * p["norm"]["scale"] @ p["out"]["kernel"], 1e-5)


def test_options_change_what_they_say():
    model = zoo.create("mamba2_test")
    variables, x = filled(model), tokens(1, 8)
    base = jax.jit(model.apply)(variables, x)
    for options in ({"norm_before_gate": True}, {"dt_limit": (0.5, 0.6)}, {"activation": "gelu"}):
        changed = jax.jit(model.clone(**options).apply)(variables, x)
        assert np.abs(changed - base).max() > 1e-3
    for options in ({"use_norm": False}, {"ssm_dim": 32}, {"wide_skip": True}, {"mlp_dim": 48}):
        other = model.clone(**options)
        assert np.isfinite(jax.jit(other.apply)(filled(other), x)).all()
        state = zoo.export(other, filled(other))
        assert_trees_close(zoo.convert(other, state), filled(other), 0)


def test_the_gate_of_a_published_mlp_comes_second():
    model = zoo.create("mamba2_test", mlp_dim=48)
    variables = filled(model)
    fc1 = zoo.export(model, variables)["backbone.layers.0.mlp.fc1.weight"]
    mlp = variables["params"]["layers_0"]["mlp"]
    np.testing.assert_array_equal(fc1[:48], mlp["up"]["kernel"].T)
    np.testing.assert_array_equal(fc1[48:], mlp["gate"]["kernel"].T)


def test_both_namings_load(small):
    model, variables, _ = small
    for layout in mamba2.LAYOUTS:
        assert_trees_close(zoo.convert(model, zoo.export(model, variables, layout)), variables, 0)


def test_the_residual_stream_is_float32():
    model = zoo.create("mamba2_test", dtype=jnp.bfloat16)
    run = lambda m: jax.eval_shape(  # noqa: E731
        lambda: m.init_with_output(jax.random.key(0), tokens(1, 4), method="features")[0]
    )
    assert run(model)["layer1"].dtype == jnp.float32
    assert run(model.clone(residual_in_float32=False))["layer1"].dtype == jnp.bfloat16


@pytest.mark.parametrize("fields", [{"head_dim": 7}, {"groups": 3}, {"ssm_dim": 96}])
def test_what_does_not_fit_is_one_sentence(fields):
    model = zoo.create("mamba2_test", **fields)
    with pytest.raises(ValueError, match="inner channels cannot be"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(1, 4)))
