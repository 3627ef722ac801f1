import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import apply, assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.imaging import styleswin
from zoo.models.imaging.styleswin import (
    AdaptiveNorm,
    Block,
    Discriminator,
    ScaledConv,
    filter_map,
    from_wavelets,
    generator_sizes,
    sinusoid_grid,
    to_pixels,
    to_wavelets,
)


@pytest.fixture(scope="module")
def small():
    model = zoo.create("styleswin_test")
    return model, filled(model)


def noise(model, batch=2, key=0):
    return jax.random.normal(jax.random.key(key), (batch, model.style_dim))


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(styleswin.__doc__)
    assert feature_shapes(zoo.create(name)) == table


# -------------------------------------------------------------------------------- wavelets


def test_wavelets_keep_energy_and_come_back():
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    bands = to_wavelets(x)
    assert bands.shape == (2, 4, 6, 12)
    np.testing.assert_allclose((bands**2).sum(), (x**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(from_wavelets(bands), x, atol=1e-5)
    flat = np.asarray(to_wavelets(jnp.ones((1, 4, 4, 1))))
    np.testing.assert_allclose(flat[..., 0], 2.0, rtol=1e-6)
    np.testing.assert_allclose(flat[..., 1:], 0.0, atol=1e-6)


def test_filters_are_true_convolutions():
    """Zeros after each pixel, a border, the flipped kernel, every second pixel; by loops."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 3, 4, 1)).astype("f"), rng.normal(size=(3, 3)).astype("f")
    spread = np.zeros((6, 8), "f")
    spread[::2, ::2] = x[0, :, :, 0]
    spread = np.pad(spread, ((2, 1), (2, 1)))
    whole = np.array([[(spread[i : i + 3, j : j + 3] * kernel[::-1, ::-1]).sum()
                       for j in range(9)] for i in range(7)])  # fmt: skip
    ours = filter_map(x, kernel, up=2, down=2, pad=(2, 1))[0, :, :, 0]
    np.testing.assert_allclose(ours, whole[::2, ::2], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- generator


def test_one_window_is_two_attentions_over_half_the_channels_each():
    """On a map of one window nothing is shifted: moving one half moves its own outputs alone."""
    block = Block(num_heads=4, window=4, mlp_ratio=1.0)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 16))
    style = jax.random.normal(jax.random.key(1), (1, 8))
    variables = jax.jit(block.init)(jax.random.key(2), x, style)
    params = dict(variables["params"])
    params["mlp"] = jax.tree.map(jnp.zeros_like, params["mlp"])
    params["out"] = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
    run = jax.jit(lambda p: block.apply({"params": p}, x, style))
    before = run(params)
    table = params["attention_1"]["relative_position_bias"]
    params["attention_1"] = {"relative_position_bias": table.at[10].add(1.0)}
    changed = np.abs(run(params) - before)[0].max((0, 1))
    assert not changed[:8].any() and changed[8:].all()


def test_only_the_second_half_is_shifted():
    block = Block(num_heads=4, window=4, mlp_ratio=1.0)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 16))
    style = jnp.ones((1, 8))
    variables = jax.jit(block.init)(jax.random.key(2), x, style)
    params = dict(variables["params"])
    params["mlp"] = jax.tree.map(jnp.zeros_like, params["mlp"])
    params["out"] = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
    run = jax.jit(lambda x: block.apply({"params": params}, x, style) - x)
    moved, still = run(jnp.roll(x, 4, 1)), jnp.roll(run(x), 4, 1)
    np.testing.assert_allclose(moved[..., :8], still[..., :8], atol=1e-5)
    assert np.abs(moved[..., 8:] - still[..., 8:]).max() > 1e-4


def test_adaptive_norm_takes_mean_and_deviation_from_the_style():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    style = jax.random.normal(jax.random.key(1), (2, 8))
    norm = AdaptiveNorm()
    variables = jax.jit(norm.init)(jax.random.key(2), x, style)
    y = apply(norm, variables, x, style=style)
    kernel = variables["params"]["style"]["kernel"]
    gamma, beta = np.split(np.asarray(style @ kernel / np.sqrt(8)), 2, -1)
    np.testing.assert_allclose(y.mean((1, 2)), beta, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 2)), np.abs(gamma), rtol=1e-4)


def test_positions_enter_by_alpha_alone(small):
    model, variables = small
    z = noise(model)

    def image(alpha, table):
        params = dict(variables["params"])
        stage = dict(params["stages_0"])
        stage["upsample"] = stage["upsample"] | {"alpha": jnp.full(1, alpha)}
        params["stages_0"] = stage
        original = styleswin.sinusoid_grid
        styleswin.sinusoid_grid = table
        try:
            return model.apply({"params": params}, z)
        finally:
            styleswin.sinusoid_grid = original

    def other(size, channels):
        return (
            sinusoid_grid(size, channels)[::-1].copy()
            if size == 8
            else sinusoid_grid(size, channels)
        )

    np.testing.assert_array_equal(image(0.0, sinusoid_grid), image(0.0, other))
    assert np.abs(image(1.0, sinusoid_grid) - image(1.0, other)).max() > 1e-4


def test_sinusoids_count_from_one_column_first():
    table = sinusoid_grid(4, 16)
    rates = np.exp(np.arange(4) * -(np.log(1e4) / 3))
    column, row = 3 * rates, 2 * rates
    wanted = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)])
    np.testing.assert_allclose(table[1, 2], wanted, rtol=1e-5, atol=1e-6)


def test_truncation_draws_styles_to_their_mean(small):
    model, variables = small
    z = noise(model)
    mean = jnp.linspace(-1, 1, 8)[None]
    run = jax.jit(lambda t: model.apply(variables, z, truncation=t, mean_latent=mean,
                                        method="features")["latent"], static_argnums=0)  # fmt: skip
    full, half, none = run(1.0), run(0.5), run(0.0)
    np.testing.assert_allclose(half, (full + mean) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(none, np.broadcast_to(mean, full.shape))
    with pytest.raises(ValueError, match=r"truncation=0\.5 needs mean_latent"):
        model.apply(variables, z, truncation=0.5)


def test_sizes_and_pixels():
    assert generator_sizes(32) == [4, 8, 16, 32]
    with pytest.raises(ValueError, match="size=48 is no power of two"):
        generator_sizes(48)
    np.testing.assert_allclose(to_pixels(jnp.zeros(3)), styleswin.MEAN, rtol=1e-6)


# --------------------------------------------------------------------------- discriminator


@pytest.fixture(scope="module")
def judge():
    model = Discriminator(size=16, base_channels=8, spectral=False)
    return model, filled(model)


def test_the_deviation_is_over_every_so_many_th_example(judge):
    """Of eight, examples 0, 2, 4, 6 are one group and 1, 3, 5, 7 the other."""
    model, variables = judge
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    before, after = (apply(model, variables, y) for y in (x, x.at[2].add(1.0)))
    changed = np.abs(before - after)[:, 0] > 0
    np.testing.assert_array_equal(changed, [True, False] * 4)
    with pytest.raises(ValueError, match="A batch of 6 cannot be cut into groups of 4"):
        model.apply(variables, x[:6])


def test_spectral_norm_finds_the_largest_singular_value():
    layer = ScaledConv(6, 3, spectral=True, activate=False)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    step = jax.jit(lambda v: layer.apply(v, x, True, mutable="batch_stats"))
    for _ in range(60):
        out, stats = step(variables)
        variables = {**variables, **stats}
    kernel = variables["params"]["raw_kernel"]
    largest = np.linalg.svd(kernel.reshape(-1, 6), compute_uv=False)[0]
    plain = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME",
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
    assert_trees_close(out, np.asarray(plain / largest), 1e-3)


def test_the_published_naming_round_trips_with_singular_vectors():
    model = Discriminator(size=16, base_channels=8, spectral=True)
    variables = filled(model)
    state = zoo.export(model, variables)
    assert state["final_linear.2.weight_v"].shape == (8,) and "dwt.ll" in state
    again = zoo.convert(model, state)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, again))


def test_the_gradient_penalty_equals_finite_differences(judge):
    """R1, half the squared gradient of the logit in the image, along one direction."""
    model, variables = judge
    with jax.enable_x64(True):
        model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        variables = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), variables)
        x = jax.random.normal(jax.random.key(0), (1, 16, 16, 3), jnp.float64)
        way = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)
        logit = jax.jit(lambda x: model.apply(variables, x).sum())
        along = (jax.grad(logit)(x) * way).sum()
        step = 1e-6
        slope = (logit(x + step * way) - logit(x - step * way)) / (2 * step)
    np.testing.assert_allclose(along, slope, rtol=1e-4)
