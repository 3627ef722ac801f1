import numpy as np
import pytest
from PIL import Image

from zoo.data.randaugment import OPERATIONS, RandAugment
from zoo.data.transforms import (
    CenterCrop,
    ColorJitter,
    MixPairs,
    Normalize,
    PixelSeries,
    RandomCrop,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    Resize,
    ToRGB,
    published_transforms,
    to_pil,
)


def photo(height=40, width=52, channels=3, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return {"image": image, "label": 3}


def rng():
    return np.random.default_rng(0)


def test_resize_is_what_pil_does_and_keeps_proportions():
    example = photo()
    resized = Resize(20, "bicubic")(example, rng())["image"]
    assert resized.shape == (20, 26, 3)
    expected = Image.fromarray(example["image"]).resize((26, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized, np.asarray(expected))


def test_centre_crop_takes_the_middle_and_pads_what_is_small():
    example = photo()
    np.testing.assert_array_equal(
        CenterCrop((20, 30))(example, rng())["image"], example["image"][10:30, 11:41]
    )
    assert CenterCrop((60, 60))(example, rng())["image"].shape == (60, 60, 3)


def test_a_flip_mirrors_columns():
    example = photo()
    flipped = RandomFlip(1.0)(example, rng())["image"]
    np.testing.assert_array_equal(flipped[:, ::-1], example["image"])
    assert RandomFlip(0.0)(example, rng()) is example


def test_normalize_is_the_formula():
    example, mean, std = photo(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (example["image"] / 255 - np.asarray(mean)) / np.asarray(std)
    out = Normalize(mean, std)(example, rng())["image"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match="takes bytes from 0 to 255, not float32: leave it out"):
        Normalize(mean, std)({"image": out}, rng())
    with pytest.raises(ValueError, match="are of pixels from 0 to 1"):
        Normalize((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "transform",
    [RandomCrop((24, 24), 4), RandomResizedCrop((24, 24)), ColorJitter(0.4), RandAugment()],
    ids=lambda t: type(t).__name__,
)
def test_augmentations_give_uint8_images_and_follow_their_generator(transform, channels):
    example = photo(channels=channels)
    kept = example["image"].copy()
    a, b = (transform(example, np.random.default_rng(7))["image"] for _ in range(2))
    others = [transform(example, np.random.default_rng(s))["image"] for s in range(8, 12)]
    np.testing.assert_array_equal(a, b)
    assert a.dtype == np.uint8 and a.shape[-1] == channels
    assert any(not np.array_equal(a, other) for other in others)
    np.testing.assert_array_equal(example["image"], kept)


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_every_operation_of_randaugment_keeps_size_and_mode(operation):
    for channels in (1, 3):
        image = to_pil(photo(channels=channels)["image"])
        out = OPERATIONS[operation](image, 0.9, rng())
        assert (out.size, out.mode) == (image.size, image.mode)


def test_a_crop_lies_in_the_image_at_every_aspect_ratio():
    for size in ((4, 200), (200, 4), (7, 7)):
        example = photo(*size)
        for seed in range(20):
            out = RandomResizedCrop((8, 8))(example, np.random.default_rng(seed))
            assert out["image"].shape == (8, 8, 3)


def test_a_series_of_pixels_is_the_image_in_one_order_for_all():
    image = photo(4, 5)["image"]
    plain = PixelSeries()(photo(4, 5), rng())
    assert set(plain) == {"series", "label"} and plain["series"].dtype == np.float32
    np.testing.assert_allclose(plain["series"] * 255, image.reshape(20, 3), rtol=1e-6)
    one, two = (PixelSeries(seed=1)(photo(4, 5, seed=s), rng())["series"] for s in (0, 1))
    order = [np.flatnonzero((plain["series"] == pixel).all(1))[0] for pixel in one]
    assert sorted(order) == list(range(20)) and order != list(range(20))
    other = PixelSeries()(photo(4, 5, seed=1), rng())["series"]
    np.testing.assert_array_equal(two, other[order])


def test_erasing_replaces_one_rectangle_with_noise():
    example = {"image": np.zeros((32, 32, 3), np.float32)}
    erased = RandomErasing(1.0)(example, rng())["image"]
    share = (erased != 0).all(-1).mean()
    assert 0.01 < share < 0.4 and not example["image"].any()
    assert RandomErasing(0.0)(example, rng()) is example


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_say_what_share_of_each_image_is_there(mixup, cutmix):
    images = np.stack([np.zeros((16, 16, 1)), np.ones((16, 16, 1))]).astype(np.float32)
    mix = MixPairs(4, mixup, cutmix, label_smoothing=0.0)
    for seed in range(10):
        out = mix({"image": images, "label": np.array([1, 2])}, np.random.default_rng(seed))
        np.testing.assert_allclose(out["label"].sum(1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(out["label"][:, 2], out["image"].mean((1, 2, 3)), atol=1e-5)


def test_labels_are_smoothed_before_mixing():
    pair = {"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.array([0, 1])}
    out = MixPairs(10, 0.0, 0.0, label_smoothing=0.1)(pair, rng())
    np.testing.assert_allclose(out["label"][0], [0.91] + [0.01] * 9, rtol=1e-5)


def test_transforms_of_bytes_refuse_normalised_images():
    with pytest.raises(ValueError, match="put it before Normalize"):
        Resize((8, 8))({"image": np.zeros((4, 4, 3), np.float32)}, rng())


def test_published_preprocessing_resizes_crops_and_normalises():
    example = photo(channels=1)
    for transform in published_transforms("swin_tiny_patch4_window7_224"):
        example = transform(example, rng())
    assert example["image"].shape == (224, 224, 3) and example["image"].dtype == np.float32
    assert ToRGB() in published_transforms("swin_test")
