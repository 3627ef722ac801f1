"""Restoration, video prediction and denoising: figures against definitions, losses against ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.data.moving_digits import MaskedClips, MovingDigits
from zoo.data.photos import PhotoPatches, Photos, photo
from zoo.inference.diffusion import Diffusion, add_noise, target
from zoo.tasks import Denoising, ImageRestoration, VideoPrediction
from zoo.tasks.image_restoration import luma, psnr, ssim


def batch_of(source, count):
    rows = [source[i] for i in range(count)]
    return {k: jnp.asarray(np.stack([r[k] for r in rows])) for k in rows[0]}


# ----------------------------------------------------------------------------- restoration


def test_luma_is_that_of_television():
    for colour, wanted in (((0, 0, 0), 16), ((1, 1, 1), 235), ((1, 0, 0), 81.481)):
        pixels = jnp.broadcast_to(jnp.float32(colour), (1, 2, 2, 3))
        np.testing.assert_allclose(luma(pixels), wanted, rtol=1e-5)
    np.testing.assert_allclose(luma(jnp.full((1, 1, 1, 1), 0.5)), 128)


def test_psnr_counts_inside_the_border():
    x = jnp.zeros((1, 16, 16, 1))
    y = x.at[:, 0].set(1.0).at[:, 8, 8].set(10 / 255)
    wanted = 10 * np.log10(255**2 / (100 / 12**2))
    np.testing.assert_allclose(psnr(x, y, 2), wanted, rtol=1e-5)
    assert psnr(x, x)[0] == pytest.approx(100)


def test_ssim_equals_its_definition():
    """By windows, in float64; and one for equal images."""
    rng = np.random.default_rng(0)
    x, y = (np.round(rng.random((1, 14, 13, 1)) * 255).astype("f") / 255 for _ in range(2))
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    total, a, b = [], *(255 * t[0, :, :, 0].astype(float) for t in (x, y))
    for i in range(4):
        for j in range(3):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            m, n = (weights * p).sum(), (weights * q).sum()
            v, w = (weights * (p - m) ** 2).sum(), (weights * (q - n) ** 2).sum()
            c = (weights * (p - m) * (q - n)).sum()
            one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            total.append(
                (2 * m * n + one) * (2 * c + two) / ((m * m + n * n + one) * (v + w + two))
            )
    np.testing.assert_allclose(ssim(x, y), np.mean(total), rtol=2e-3)
    np.testing.assert_allclose(ssim(x, x), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="SSIM needs 11x11 pixels"):
        ssim(x, x, 4)


def test_photos_come_small_and_large():
    patches = PhotoPatches(4, size=12, scale=3)
    first, again = patches[1], patches[1]
    assert first["images"].shape == (12, 12, 3) and first["target"].shape == (36, 36, 3)
    np.testing.assert_array_equal(first["target"], again["target"])
    means = first["target"].reshape(12, 3, 12, 3, 3).mean((1, 3))
    assert np.abs(first["images"] - means).mean() < 0.05
    with pytest.raises(ValueError, match="There is no photo 'cat'"):
        PhotoPatches(1, "cat")[0]


def test_patches_of_shrunk_and_recoloured_photos_are_pairs_still():
    patches = PhotoPatches(3, size=16, zooms=(1.0, 0.5), recolour=True)
    plain = PhotoPatches(3, size=16, zooms=(1.0, 0.5))
    for i in range(3):
        small, large = patches[i]["images"], patches[i]["target"]
        assert small.dtype == large.dtype == np.float32
        assert 0 <= large.min() and large.max() <= 1
        means = large.reshape(16, 2, 16, 2, 3).mean((1, 3))
        assert np.abs(small - means).mean() < 0.05
        assert np.abs(large - plain[i]["target"]).mean() > 0.02
    whole = np.float32(PhotoPatches(1, size=213, zooms=(0.998,), turn=False)[0]["target"])
    assert whole.shape == (426, 426, 3)


def test_photos_are_held_out_as_a_whole():
    photos = Photos(("flower", "hopper"), size=(140, 160), scale=3)
    assert len(photos) == 2
    for i, name in enumerate(photos.names):
        target = photos[i]["target"]
        assert photos[i]["images"].shape == (140, 160, 3) and target.shape == (420, 480, 3)
        pixels = photo(name)
        top, left = (pixels.shape[0] - 420) // 2, (pixels.shape[1] - 480) // 2
        middle = pixels[top : top + 420, left : left + 480]
        np.testing.assert_array_equal(np.round(target * 255), middle)
    with pytest.raises(ValueError, match=r"'flower' is 427x640; size=.* needs 600x300"):
        Photos(("flower",), size=(200, 100), scale=3)[0]


@pytest.mark.slow
def test_restoration_reports_bicubic_beside_the_model():
    model, task = zoo.create("hat_test"), ImageRestoration(crop=2)
    batch = batch_of(PhotoPatches(2, "flower", size=8), 2)
    variables = jax.jit(model.init)(jax.random.key(0), batch["images"])
    metrics = jax.jit(lambda v, b: task.metrics(model, v, b))(variables, batch)
    said = jax.jit(lambda v, b: task.predict(model, v, b))(variables, batch)["image"]
    assert set(metrics) == {"loss", "psnr", "ssim", "bicubic_psnr"}
    np.testing.assert_allclose(
        metrics["psnr"].compute(), psnr(said, batch["target"], 2).mean(), rtol=1e-4
    )
    wrong = batch | {"target": batch["target"][:, :8]}
    with pytest.raises(ValueError, match="its upscale must be that of the data"):
        task.metrics(model, variables, wrong)


# ---------------------------------------------------------------------------------- frames


def test_digits_fly_straight_and_bounce():
    clips = MovingDigits(8, frames=6, size=24)
    for i in range(8):
        example = clips[i]
        clip = np.concatenate([example["frames"], example["target"]])[..., 0]
        assert clip.shape == (12, 24, 24) and clip.min() == 0 and clip.max() <= 1
        rows = np.arange(24)
        weight = clip.sum((1, 2))
        centre = (clip.sum(2) @ rows) / weight
        speed = np.abs(np.diff(centre))
        assert weight.std() < 1e-3 * weight.mean()
        assert speed.max() <= 3.01


@pytest.mark.slow
def test_repeating_the_last_frame_is_the_baseline():
    model, task = zoo.create("predformer_test"), VideoPrediction()
    shape = model.example_inputs(2)["frames"].shape
    frames, target_ = jax.random.uniform(jax.random.key(0), (2, *shape))
    variables = jax.jit(model.init)(jax.random.key(1), frames)
    metrics = task.metrics(model, variables, {"frames": frames, "target": target_})
    wanted = ((frames[:, -1:] - target_) ** 2).mean()
    np.testing.assert_allclose(metrics["last_frame_loss"].compute(), wanted, rtol=1e-5)
    error = metrics["loss"].compute() * np.prod(shape[2:])
    np.testing.assert_allclose(metrics["frame_mse"].compute(), error, rtol=1e-5)


# ------------------------------------------------------------------------------- denoising


@pytest.fixture(scope="module")
def denoiser():
    model = zoo.create("vdt_test", in_channels=1, learned_variance=False)
    clips = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    variables = jax.jit(model.init)(jax.random.key(1), clips, jnp.zeros(2))
    return model, variables, clips


@pytest.mark.slow
def test_a_network_of_zeros_errs_as_much_as_zeros(denoiser):
    """At its start a VDT gives zeros, so its error is the mean square of what it should say."""
    model, variables, clips = denoiser
    for kind in ("noise", "velocity", "clean", "flow"):
        metrics = Denoising(kind).metrics(model, variables, {"latents": clips})
        np.testing.assert_allclose(
            metrics["error"].compute(), metrics["zeros_error"].compute(), rtol=1e-6
        )


def test_only_what_is_to_be_made_counts(denoiser):
    model, variables, clips = denoiser
    mask = jnp.zeros(clips.shape[:4]).at[:, 1:].set(1.0)
    task = Denoising("clean")
    metrics = task.metrics(model, variables, {"latents": clips, "mask": mask})
    np.testing.assert_allclose(metrics["error"].compute(), (clips[:, 1:] ** 2).mean(), rtol=1e-5)
    none = task.metrics(model, variables, {"latents": clips, "mask": 0 * mask})
    assert none["loss"].compute() == 0


def test_samples_keep_what_is_given(denoiser):
    model, variables, clips = denoiser
    mask = jnp.zeros(clips.shape[:4]).at[:, 1:].set(1.0)
    for task in (Denoising("velocity", sampling_steps=3), Denoising("flow", sampling_steps=3)):
        said = task.predict(model, variables, {"latents": clips, "mask": mask})["samples"]
        np.testing.assert_array_equal(said[:, 0], clips[:, 0])
        assert np.abs(said[:, 1:] - clips[:, 1:]).max() > 0.1


@pytest.mark.slow
def test_the_bound_trains_the_variance_alone():
    model = zoo.create("vdt_test", in_channels=1)
    clips = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    variables = jax.jit(model.init)(jax.random.key(1), clips, jnp.zeros(2))
    task = Denoising()

    def part(name):
        def value(v):
            losses, _ = task.losses(model, v, {"latents": clips}, jax.random.key(2), None)
            return losses[name].compute()

        head = jax.grad(value)(variables)["params"]["head"]["bias"]
        return np.abs(head).reshape(4, 2).max(0) > 0

    assert part("bound").tolist() == [False, True]
    assert part("error").tolist() == [True, False]


def test_masked_clips_ask_for_what_follows():
    clips = MaskedClips(MovingDigits(4, frames=3, size=20), task="predict")
    example = clips[0]
    assert example["latents"].shape == (6, 20, 20, 1) and example["latents"].min() == -1
    assert example["mask"].mean((1, 2)).tolist() == [0, 0, 0, 1, 1, 1]


def test_the_targets_are_those_of_the_schedule():
    """A network that knows the clean clip has no error, whatever it predicts."""
    clip = jax.random.normal(jax.random.key(0), (1, 2, 2, 1))
    level, _ = Diffusion().at(jnp.array([300]))
    noise = jax.random.normal(jax.random.key(1), clip.shape)
    x = add_noise(clip, noise, level)
    velocity = target("velocity", clip, noise, level)
    np.testing.assert_allclose(level.alpha[0] * x - level.sigma[0] * velocity, clip, atol=1e-5)
