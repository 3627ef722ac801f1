import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.inference import in_tiles


def images(height, width, channels=3):
    return jax.random.uniform(jax.random.key(0), (1, height, width, channels))


def local(x):
    """A function that sees three pixels far and doubles the size."""
    for _ in range(3):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = (x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + 2 * x[:, 1:-1, 2:]) / 5
        x = jnp.sin(3 * x)
    return x.repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize("size", [(40, 23), (8, 33), (21, 64), (5, 6)])
@pytest.mark.parametrize("tile, overlap", [(8, 3), (16, 4)])
def test_what_lies_within_reach_is_as_in_the_whole_image(size, tile, overlap):
    x = images(*size)
    whole = jax.jit(local)(x)
    tiled = jax.jit(lambda x: in_tiles(local, x, scale=2, tile=tile, overlap=overlap))(x)
    np.testing.assert_allclose(tiled, whole, atol=1e-6)


def test_too_little_overlap_shows_at_the_seams_alone():
    x = images(32, 32, 1)
    whole, tiled = local(x), in_tiles(local, x, scale=2, tile=16, overlap=0)
    off = (np.abs(whole - tiled) > 1e-6)[0, ..., 0]
    inside = np.zeros((64, 64), bool)
    for at in (slice(0, 26), slice(38, 64)):  # more than three pixels from the seam at 16
        for other in (slice(0, 26), slice(38, 64)):
            inside[at, other] = True
    assert off.any() and not off[inside].any()


@pytest.mark.slow
def test_a_network_of_windows_agrees_up_to_what_means_over_the_image_do():
    """HAT's channel attention takes means over all pixels: without it tiles are exact."""
    model = zoo.create("hat_test", depths=(2,), conv_scale=0.0)
    x = images(78, 61)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    variables = jax.tree.map(lambda p: p * (4 if p.ndim > 1 else 1), variables)
    run = jax.jit(lambda x: model.apply(variables, x))
    tiled = jax.jit(lambda x: in_tiles(lambda y: model.apply(variables, y), x, scale=2, tile=16,
                                       overlap=16, align=4))(x)  # fmt: skip
    whole = run(x)
    scale = np.abs(whole).max()
    np.testing.assert_allclose(tiled, whole, atol=2e-5 * scale)


def test_memory_is_that_of_a_tile():
    """What the compiler sets aside for a function that widens pixels to 256 channels."""
    inward, outward = jax.random.normal(jax.random.key(1), (2, 3, 256))

    def wide(x):
        return jnp.sin(x @ inward) @ outward.T

    spec = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    whole, tiled = (
        jax.jit(run).lower(spec).compile().memory_analysis().temp_size_in_bytes
        for run in (wide, lambda x: in_tiles(wide, x, tile=16, overlap=4))
    )
    assert whole > 128 * 128 * 256 * 4 / 2
    assert tiled < whole / 8


def test_tiles_that_windows_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tile=10 and overlap=4 must be multiples of 4"):
        in_tiles(local, images(16, 16), scale=2, tile=10, overlap=4, align=4)
