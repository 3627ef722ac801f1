import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled_state_dict,
    sin_loss,
)

import zoo
from zoo.models.incontext import icl_boolean, mixers
from zoo.models.incontext.prompt import interleave

EVERY = icl_boolean.MIXERS + icl_boolean.CELLS


def prompts(batch=2, points=8, dims=5, seed=0):
    rng = np.random.default_rng(seed)
    signs = lambda *shape: 2.0 * rng.integers(0, 2, shape).astype("f") - 1  # noqa: E731
    return signs(batch, points, dims), signs(batch, points)


def filled(model):
    """Unit-scale weights; the four names of Hyena's one frequency say the same."""
    state = filled_state_dict(model)
    for name in state:
        if name.endswith(".freq"):
            head, _, leaf = name.rsplit(".", 2)
            state[name] = state[f"{head}.1.{leaf}"]
    return zoo.convert(model, state)


def small(mixer):
    return zoo.create("icl_boolean_test", mixer=mixer, modes=8)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(icl_boolean.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


@pytest.mark.parametrize("mixer", EVERY)
def test_no_prediction_sees_its_label_or_later_points(mixer):
    model = small(mixer)
    variables, call, (xs, ys) = filled(model), jax.jit(model.apply), prompts()
    before = np.asarray(call(variables, xs, ys))  # done before its inputs change
    ys[:, 3] *= -1
    xs[:, 5] *= -1
    after = call(variables, xs, ys)
    scale = np.abs(before).max()  # an FFT spreads the rounding of later tokens
    np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=0, atol=1e-5 * scale)
    changed = np.abs(after - before).max(0)
    assert changed[4:].min() > 0 and changed[5] > 0.01 * scale


@pytest.mark.parametrize("mixer", EVERY)
def test_every_leaf_has_a_finite_gradient(mixer):
    model = small(mixer)
    variables, (xs, ys) = filled(model), prompts()
    grads = jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, xs, ys))))(variables)
    for path, g in jax.tree.leaves_with_path(grads):
        idle = "idle" in jax.tree_util.keystr(path)
        assert np.isfinite(g).all() and (np.abs(g).max() > 0) != idle, path


@pytest.mark.parametrize("mixer", EVERY)
def test_bits_come_back(mixer):
    model = small(mixer)
    variables = filled(model)
    assert_trees_close(zoo.convert(model, zoo.export(model, variables)), variables, 0)


@pytest.mark.parametrize("mixer", ["retention", "lstm", "gru"])
def test_steps_and_pieces_equal_the_whole_prompt(mixer):
    model = small(mixer)
    variables, (xs, ys) = filled(model), prompts()
    step = jax.jit(lambda v, state, z: model.apply(v, state, z, method="step"))
    tokens, state, pieces = interleave(xs, ys), model.init_state(2, 16), []
    for start, end in ((0, 7), (7, 8), (8, 16)):
        state, out = step(variables, state, tokens[:, start:end])
        pieces.append(out)
    whole = jax.jit(model.apply)(variables, xs, ys)
    assert_trees_close(jnp.concatenate(pieces, 1)[:, ::2], whole, 1e-5)


def test_retention_is_attention_with_decay_in_place_of_softmax():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 6, 8)).astype("f")
    module = mixers.Retention(2)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    p = variables["params"]
    q, k, v = (
        t.reshape(6, 2, 4) for t in np.split(x[0] @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, -1)
    )
    gamma = 1 - 2.0 ** (-5 - np.arange(2))
    age = np.arange(6)[:, None] - np.arange(6)
    decay = np.where(age >= 0, gamma[:, None, None] ** np.maximum(age, 0), 0)
    y = np.einsum("nij,jnd->ind", np.einsum("ind,jnd->nij", q, k) * decay, v).reshape(6, 8)
    gate = x[0] @ p["gate"]["kernel"] + p["gate"]["bias"]
    want = (y * jax.nn.silu(gate)) @ p["out"]["kernel"] + p["out"]["bias"]
    assert_trees_close(jax.jit(module.apply)(variables, x)[0][0], want, 1e-5)


def test_a_long_convolution_is_the_sum_over_what_came_before():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 9, 3)), rng.standard_normal((9, 3))
    want = np.zeros_like(x)
    for t in range(9):
        want[:, t] = sum(kernel[s] * x[:, t - s] for s in range(t + 1))
    assert_trees_close(mixers.causal_convolution(x, kernel), want, 1e-5)


def test_the_state_space_kernel_is_a_softmax_of_exponents():
    """Also of modes that grow, whose exponents reach e^100."""
    rng = np.random.default_rng(0)
    log_dt = rng.uniform(-1, 0.5, (2, 2)).astype("f")
    modes = np.array([[-0.5, 3.0], [2.0, 1.0]], "f")
    weight = rng.standard_normal((2, 2, 2)).astype("f")
    steps, length = np.exp(log_dt.astype(float)), 30
    eigenvalue = modes[:, 0] + 1j * modes[:, 1]
    scaled = steps[:, :1] * modes[:, 0] + 1j * steps[:, 1:] * modes[:, 1]
    powers = np.exp(scaled[..., None] * np.arange(length))
    normal = powers / powers.sum(-1, keepdims=True)
    complex_weight = weight[..., 0] + 1j * weight[..., 1]
    want = np.einsum("cn,cnl->lc", complex_weight / eigenvalue, normal).real
    assert_trees_close(mixers.ssm_kernel(log_dt, modes, weight, length), want, 1e-4)


def test_hippo_starts_with_known_modes():
    values = mixers.skew_hippo_eigenvalues(16)
    np.testing.assert_allclose(values.real, -0.5, atol=1e-9)
    assert (np.diff(values.imag) < 0).all() and values.imag[-1] > 0


def test_hyena_keeps_one_frequency_under_four_names():
    model = small("hyena")
    state = zoo.export(model, filled(model))
    names = [name for name in state if name.endswith(".freq")]
    assert len(names) == 4 * model.depth
    first = "_backbone.blocks.0.hyena_operator.filter_fn.implicit_filter"
    np.testing.assert_array_equal(state[f"{first}.1.freq"], state[f"{first}.7.freq"])
    state[f"{first}.7.freq"] = state[f"{first}.7.freq"] + 1
    with pytest.raises(ValueError, match="tied tensors differ in value"):
        zoo.convert(model, state)


@pytest.mark.parametrize(
    "fields, points, sentence",
    [
        ({}, 13, "reads at most 12 points, not 13"),
        ({"mixer": "rwkv"}, 4, "mixer='rwkv' is none of 'attention', 'retention'"),
        ({"mixer": "hyena", "order": 1}, 4, "order=1, but Hyena has at least 2 gates"),
        ({"mixer": "retention", "num_heads": 5}, 4, "num_heads=5 does not divide 32 channels"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, points, sentence):
    model = zoo.create("icl_boolean_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(model.init, jax.random.key(0), *prompts(1, points))


def test_attention_gives_no_state_and_dss_reads_prompts_of_any_length():
    with pytest.raises(ValueError, match="mixer='attention' gives no states; retention"):
        small("attention").init_state(1, 4)
    model = small("dss")
    assert jax.eval_shape(model.apply, filled(model), *prompts(1, 300)).shape == (1, 300)
