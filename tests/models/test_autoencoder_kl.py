import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    filled_state_dict,
)

import zoo
from zoo.models.imaging import autoencoder_kl


@pytest.fixture(scope="module")
def small():
    model = zoo.create("autoencoder_kl_test")
    return model, filled(model)


def images(height=8, width=12, batch=2):
    return jax.random.uniform(jax.random.key(0), (batch, height, width, 3), minval=-1)


def run(model, variables, *inputs, method="features"):
    return jax.jit(lambda v, *x: model.apply(v, *x, method=method))(variables, *inputs)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(autoencoder_kl.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_maps_are_halved_with_zeros_at_the_right_and_below():
    x = jax.random.normal(jax.random.key(0), (1, 6, 4, 1))
    filters = np.zeros((2, 3, 3, 1, 1), np.float32)
    filters[0, 0, 0], filters[1, 2, 2] = 1, 1

    def with_filter(kernel):
        def conv(channels, size, strides, padding, name):
            return lambda x: jax.lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        return autoencoder_kl.halve(x, conv)

    np.testing.assert_array_equal(with_filter(filters[0]), x[:, ::2, ::2])
    last = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 2::2, 2::2]
    np.testing.assert_array_equal(with_filter(filters[1]), last)


def test_latents_are_scaled_on_the_way_out_and_back_on_the_way_in(small):
    model, variables = small

    @jax.jit
    def there_and_back(variables, x):
        models = (model.clone(scale=s, shift=t) for s, t in ((1.0, 0.0), (0.25, -2.0)))
        parts = []
        for m in models:
            whole = m.apply(variables, x, method="features")
            latents = m.apply(variables, x, method="encode")
            parts.append((whole, latents, m.apply(variables, latents, method="decode")))
        return parts

    (plain, *_), (moved, *_) = both = there_and_back(variables, images())
    assert_trees_close(moved["latents"], 0.25 * (np.asarray(plain["latents"]) + 2), 1e-6)
    assert_trees_close(moved["image"], plain["image"], 1e-5)
    for whole, latents, image in both:
        assert_trees_close(latents, whole["latents"], 1e-6)
        assert_trees_close(image, whole["image"], 1e-5)


def test_latents_are_drawn_with_the_deviation_that_the_encoder_says(small):
    model, variables = small
    key = jax.random.key(3)
    mean, log_variance = jnp.split(run(model, variables, images())["moments"], 2, -1)
    drawn = run(model, variables, images(), key, method="encode")
    deviation = (drawn / model.scale - mean) / jax.random.normal(key, mean.shape)
    assert_trees_close(deviation, jnp.exp(0.5 * log_variance), 1e-4)
    assert np.std(deviation) > 0.01


def test_files_of_before_and_after_the_renaming_give_the_same_variables():
    model = zoo.create("autoencoder_kl_test")
    state = filled_state_dict(model)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    before = {renamed(name): value for name, value in state.items()}
    assert set(before) == set(zoo.export(model, zoo.convert(model, state), "hub"))
    assert len(set(before) - set(state)) == 16
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, before),
                 zoo.convert(model, state))  # fmt: skip


def test_hub_ids_lead_to_their_variant():
    for name, scale in (("sd-vae-ft-mse", 0.18215), ("sdxl-vae", 0.13025)):
        assert zoo.create(f"stabilityai/{name}").scale == scale


def test_what_does_not_fit_is_said_in_a_sentence(small):
    model, variables = small
    for given, method, message in (
        (images(9, 8), "features", "9x8 is no whole number of latents of 2x2 pixels"),
        (images()[..., :1], "features", r"images of shape \(batch, height, width, 3\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), "features", "floats from -1 to 1, not uint8"),
        (images(), "decode", r"latents of shape \(batch, rows, columns, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(variables, given, method=method)
    with pytest.raises(ValueError, match="norm_groups=3 does not divide"):
        jax.eval_shape(model.clone(norm_groups=3).init, jax.random.key(0), images())
