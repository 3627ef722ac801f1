import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    apply,
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    random_images,
)

import zoo
from zoo.models.vision import svt

dtcwt, inverse_dtcwt = jax.jit(svt.dtcwt), jax.jit(svt.inverse_dtcwt)  # op by op takes seconds


@pytest.fixture(scope="module")
def small():
    model = zoo.create("svt_test", image_size=(40, 56))  # a map of 10 x 14, and then of 5 x 7
    return model, filled(model)


@pytest.fixture(scope="module")
def out(small):
    model, variables = small
    return apply(model, variables, random_images(model), method="features")


def maps(*shape):
    return jax.random.normal(jax.random.key(0), shape)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(svt.__doc__)
    assert feature_shapes(zoo.create(name)) == table


# -------------------------------------------------------------------------- the transform


@pytest.mark.parametrize("size", [(16, 12), (2, 30), (56, 56)])
def test_the_inverse_reconstructs_perfectly(size):
    x = maps(2, *size, 3)
    low, high = dtcwt(x)
    assert low.shape == x.shape and high.shape == (2, 6, 2, size[0] // 2, size[1] // 2, 3)
    np.testing.assert_allclose(inverse_dtcwt(low, high), x, atol=1e-6 * np.abs(x).max())


def test_a_constant_map_is_all_lowpass():
    low, high = dtcwt(jnp.full((1, 8, 10, 1), 3.0))
    np.testing.assert_allclose(low, 3.0, atol=1e-5)
    np.testing.assert_allclose(high, 0.0, atol=1e-6)


def energies(image):
    """Of the six bands of one grey map."""
    _, high = dtcwt(jnp.asarray(image, jnp.float32)[None, ..., None])
    return np.square(high).sum((0, 2, 3, 4, 5))


def test_edges_are_in_the_bands_of_their_orientation():
    """Vertical edges vary along the rows only: 75 and 105 degrees. Horizontal ones: 15 and 165."""
    edge = np.zeros((16, 16))
    edge[:, 7:] = 1.0
    for image, bands in ((edge, [2, 3]), (edge.T, [0, 5])):
        energy = energies(image)
        assert energy[bands].min() > 1.0 and np.delete(energy, bands).max() < 1e-10
        assert energy[bands[0]] == pytest.approx(energy[bands[1]], rel=1e-4)  # mirror images


def test_diagonal_stripes_choose_between_mirrored_bands():
    """What a real transform cannot: 45 and 135 degrees apart."""
    y, x = np.mgrid[:32, :32]
    falling, rising = (energies(np.cos(np.pi / 2 * (x + s * y)))[[1, 4]] for s in (1, -1))
    assert falling[0] > 15 * falling[1] and rising[1] > 15 * rising[0]


def test_the_filters_are_those_of_the_published_files():
    f = svt.filters()
    low = np.convolve(f["h0o"], f["g0o"]) + np.convolve(f["h1o"], f["g1o"])
    np.testing.assert_allclose(low, np.arange(31) == 15, atol=1e-9)  # a delay and nothing else
    np.testing.assert_allclose([f[n].sum() for n in ("h0o", "g0o", "h0a")], [1, 1, 2**0.5], 1e-6)
    np.testing.assert_allclose([f[n].sum() for n in ("h1o", "g1o", "h1a")], 0, atol=1e-6)
    np.testing.assert_allclose([(f[n] ** 2).sum() for n in ("h0a", "h1b")], 1, atol=1e-6)


# ------------------------------------------------------------------------------ the layers


def test_scattering_with_identity_weights_without_relu_is_the_identity(monkeypatch):
    monkeypatch.setattr(svt.nn, "relu", lambda z: z)
    x = maps(2, 8, 12, 16)
    layer = svt.Scatter()
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes)
    params["lowpass"] = jnp.ones_like(params["lowpass"])
    for name in ("bands1", "bands2"):
        params[name]["kernel"] = params[name]["kernel"].at[0].set(jnp.eye(4))
    assert_trees_close(apply(layer, {"params": params}, x), x, 1e-5)


def test_matrices_on_the_bands_are_complex_products():
    """Of four blocks of channels, against NumPy's complex numbers."""
    x = maps(1, 4, 6, 8)
    layer = svt.Scatter()
    params = jax.tree.map(lambda p: p * 20, jax.jit(layer.init)(jax.random.key(1), x)["params"])
    low, high = (np.asarray(t, np.float64) for t in dtcwt(x))
    z = high[:, :, 0] + 1j * high[:, :, 1]
    complex_of = lambda p: np.asarray(p[0], np.float64) + 1j * np.asarray(p[1])  # noqa: E731
    relu = lambda z: np.maximum(z.real, 0) + 1j * np.maximum(z.imag, 0)  # noqa: E731
    for name, activation in (("bands1", relu), ("bands2", lambda z: z)):
        kernel, bias = (complex_of(params[name][part]) for part in ("kernel", "bias"))
        parts = np.split(z, 4, -1)
        z = np.concatenate([p @ k + b for p, k, b in zip(parts, kernel, bias, strict=True)], -1)
        z = activation(z)
    high = np.stack([z.real, z.imag], 2).astype(np.float32)
    wanted = inverse_dtcwt((low * params["lowpass"]).astype(np.float32), high)
    assert_trees_close(apply(layer, {"params": params}, x), wanted, 1e-5)


def test_the_class_block_changes_the_class_alone(out):
    tokens = out["stage2"].reshape(2, 35, -1)
    assert_trees_close(out["class_block"][:, 1:], tokens, 1e-5)
    assert np.abs(out["class_block"][:, 0] - tokens.mean(1)).max() > 0.1


def test_logits_join_the_class_and_the_best_of_every_token(small, out):
    wanted = out["class_logits"] + 0.5 * out["token_logits"].max(1)
    assert_trees_close(out["logits"], wanted, 1e-5)
    model, variables = small
    params = {k: v for k, v in variables["params"].items() if k != "token_head"}
    alone = model.clone(token_label=False)
    logits = apply(alone, {**variables, "params": params}, random_images(model))
    assert_trees_close(logits, out["class_logits"], 1e-5)


def test_training_moves_the_running_statistics_of_the_stem(small):
    model, variables = small
    run = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    _, new = run(variables, random_images(model))
    old = variables["batch_stats"]["embed"]
    assert set(old) == {"norm1", "norm2", "norm3"}
    for norm, statistics in new["batch_stats"]["embed"].items():
        assert np.abs(statistics["var"] - old[norm]["var"]).min() > 0


def test_sizes_that_do_not_fit_are_refused(small):
    model, variables = small
    with pytest.raises(ValueError, match=r"\(batch, 40, 56, 3\), not \(1, 32, 32, 3\)"):
        model.apply(variables, jnp.zeros((1, 32, 32, 3)))
    model = zoo.create("svt_test", image_size=36)
    with pytest.raises(ValueError, match="even sides and a multiple of 4 channels, not 9x9x32"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 36, 36, 3)))


def test_without_the_second_head_svt_b_has_half_a_million_parameters_less():
    model = zoo.create("svt_b", token_label=False, drop_path=0.0)
    x = model.example_inputs()["images"]
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == 32_365_544
