"""Image transforms for classification: pure functions of an example and a generator.

Geometry is PIL's (antialiased when shrinking, as torchvision's transforms on PIL images are); the
rest is NumPy. Until `Normalize`, images are uint8 `[height, width, channels]`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from zoo.system import Preprocessing

Example = dict[str, Any]
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_pil(image: np.ndarray) -> Image.Image:
    """`uint8 [height, width, 1 or 3]` as a PIL image."""
    if image.dtype != np.uint8:
        raise ValueError(
            f"This transform takes uint8 images, not {image.dtype}: put it before Normalize."
        )
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pil(image: Image.Image) -> np.ndarray:
    """A PIL image as `uint8 [height, width, channels]`."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def resize_image(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """An image of `size` (height, width)."""
    if image.shape[:2] == tuple(size):
        return image
    return from_pil(to_pil(image).resize((size[1], size[0]), RESAMPLING[interpolation]))


@dataclass(frozen=True)
class ToRGB:
    """Repeat a grey channel three times."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        image = example["image"]
        return {**example, "image": np.repeat(image, 3, -1) if image.shape[-1] == 1 else image}


@dataclass(frozen=True)
class Resize:
    """To `size` (height, width); one number: the shorter side, the other in proportion."""

    size: int | tuple[int, int]
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        image, size = example["image"], self.size
        if isinstance(size, int):
            height, width = image.shape[:2]
            short = min(height, width)
            size = int(size * height / short), int(size * width / short)
        return {**example, "image": resize_image(image, size, self.interpolation)}


@dataclass(frozen=True)
class CenterCrop:
    """The middle `size` (height, width); a smaller image is padded with zeros."""

    size: tuple[int, int]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        image = _pad_to(example["image"], self.size)
        top, left = (round((s - w) / 2) for s, w in zip(image.shape[:2], self.size, strict=True))
        return {**example, "image": _crop(image, top, left, self.size)}


@dataclass(frozen=True)
class RandomCrop:
    """A random `size` (height, width) of the image with `padding` zeros on every side."""

    size: tuple[int, int]
    padding: int = 0

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        p = self.padding
        image = np.pad(example["image"], ((p, p), (p, p), (0, 0)))
        image = _pad_to(image, self.size)
        top, left = (
            int(rng.integers(s - w + 1)) for s, w in zip(image.shape[:2], self.size, strict=True)
        )
        return {**example, "image": _crop(image, top, left, self.size)}


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, by area and aspect ratio, resized to `size` (Inception crop)."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        image = example["image"]
        top, left, size = self._box(*image.shape[:2], rng)
        image = resize_image(_crop(image, top, left, size), self.size, self.interpolation)
        return {**example, "image": image}

    def _box(self, height: int, width: int, rng: np.random.Generator):
        low, high = np.log(self.ratio)
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                return int(top), int(left), (h, w)
        # no luck: the largest middle part with an allowed aspect ratio
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        return (height - h) // 2, (width - w) // 2, (h, w)


@dataclass(frozen=True)
class RandomFlip:
    """Left-right, with a probability."""

    probability: float = 0.5

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        if rng.random() >= self.probability:
            return example
        return {**example, "image": example["image"][:, ::-1]}


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation times `1 ± strength`, in random order."""

    strength: float = 0.4

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        image = example["image"].astype(np.float32)
        for kind in rng.permutation(3):
            factor = rng.uniform(max(0.0, 1 - self.strength), 1 + self.strength)
            image = np.clip(_blended(image, int(kind), factor), 0, 255)
        return {**example, "image": np.round(image).astype(np.uint8)}


@dataclass(frozen=True)
class Normalize:
    """To float32: `(image / 255 - mean) / std`, per channel.

    Raises:
      ValueError: for a mean of another scale, or a deviation of 0; when called, for images that
        are floats already.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Check the numbers."""
        if any(not abs(m) <= 1 for m in self.mean) or any(not s > 0 for s in self.std):
            raise ValueError(
                f"Normalize has mean={self.mean} and std={self.std}; they are of pixels from 0 to "
                "1 (those of 0 to 255 divided by 255), and no deviation is 0."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        if (kind := example["image"].dtype).kind == "f":
            raise ValueError(
                f"Normalize takes bytes from 0 to 255, not {kind}: leave it out where images are "
                "scaled already, or give (255 * images).astype('uint8')."
            )
        scale = np.float32(1 / 255) / np.asarray(self.std, np.float32)
        shift = np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)
        return {**example, "image": example["image"].astype(np.float32) * scale - shift}


@dataclass(frozen=True)
class PixelSeries:
    """An image as `series [pixels, channels]` in [0, 1], row by row.

    Attributes:
      seed: of the order in which pixels come, one for all images (permuted sequential MNIST); None:
        as they stand.
    """

    seed: int | None = None

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        example = dict(example)
        image = example.pop("image")
        series = image.reshape(-1, image.shape[-1]).astype(np.float32) / 255
        if self.seed is not None:
            series = series[np.random.default_rng(self.seed).permutation(len(series))]
        return {**example, "series": series}


@dataclass(frozen=True)
class RandomErasing:
    """Noise in a random rectangle of a normalised image (Zhong et al., arXiv 1708.04896).

    As timm's "pixel" mode: one rectangle of 2 % to a third of the area, filled with unit normals.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        if rng.random() >= self.probability:
            return example
        image = np.array(example["image"])
        height, width, channels = image.shape
        for _ in range(10):
            area = height * width * rng.uniform(*self.area)
            aspect = math.exp(rng.uniform(*np.log(self.ratio)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                noise = rng.standard_normal((h, w, channels))
                image[top : top + h, left : left + w] = noise.astype(image.dtype)
                break
        return {**example, "image": image}


@dataclass(frozen=True)
class MixPairs:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of two examples with each other.

    The labels become mixed, smoothed distributions `[2, num_classes]`. timm draws one weight for a
    whole batch in its default mode; here every pair has its own (timm's "pair" mode), so that what
    a process reads does not depend on how many there are.

    Attributes:
      num_classes: length of a distribution.
      mixup: alpha of the Beta distribution of weights; 0 is never.
      cutmix: the same for CutMix; with both, one of them is drawn for each pair.
      switch_probability: of CutMix where both are on.
      probability: of mixing at all.
      label_smoothing: applied before mixing, as in timm.
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    switch_probability: float = 0.5
    probability: float = 1.0
    label_smoothing: float = 0.1

    def __call__(self, pair: Example, rng: np.random.Generator) -> Example:
        """Mix arrays with a leading axis of two."""
        images = pair["image"].astype(np.float32)
        off = self.label_smoothing / self.num_classes
        labels = np.full((2, self.num_classes), off, np.float32)
        labels[np.arange(2), pair["label"]] += 1 - self.label_smoothing
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch_probability)
        alpha = self.cutmix if cut else self.mixup
        if alpha > 0 and rng.random() < self.probability:
            weight = rng.beta(alpha, alpha)
            if cut:
                images, weight = _cut(images, weight, rng)
            else:
                images = weight * images + (1 - weight) * images[::-1]
            labels = weight * labels + (1 - weight) * labels[::-1]
        return {**pair, "image": images.astype(np.float32), "label": labels.astype(np.float32)}


def published_transforms(name: str, image_size: tuple[int, int] | None = None) -> tuple:
    """The evaluation transforms that a variant's authors use (its `Preprocessing`).

    Args:
      name: an image variant.
      image_size: another size than the variant's.

    Raises:
      ValueError: if the variant has no image preprocessing.
    """
    from zoo.registry import info

    variant = info(name)
    how = variant.preprocessing
    if how is None:
        raise ValueError(f"{name!r} is no image model: it has no image preprocessing.")
    return transforms_of(how, image_size or variant.create().image_size)


def transforms_of(how: "Preprocessing", size: tuple[int, int]) -> tuple:
    """The transforms that make images of `size` as a `Preprocessing` says."""
    if how.crop == 1.0:
        geometry: tuple = (Resize(size, how.interpolation),)
    elif how.squash:
        whole = (round(size[0] / how.crop), round(size[1] / how.crop))
        geometry = (Resize(whole, how.interpolation), CenterCrop(size))
    else:
        geometry = (Resize(int(min(size) / how.crop), how.interpolation), CenterCrop(size))
    return (ToRGB(), *geometry, Normalize(how.mean, how.std))


def _crop(image: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    return image[top : top + size[0], left : left + size[1]]


def _pad_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    short = [max(0, want - have) for want, have in zip(size, image.shape[:2], strict=True)]
    if not any(short):
        return image
    return np.pad(image, [(s // 2, s - s // 2) for s in short] + [(0, 0)])


def _grey(image: np.ndarray) -> np.ndarray:
    """Luma `[height, width, 1]`, as PIL weighs the colours."""
    if image.shape[-1] == 1:
        return image
    return image @ np.asarray([[0.299], [0.587], [0.114]], image.dtype)


def _blended(image: np.ndarray, kind: int, factor: float) -> np.ndarray:
    """Float image against black (brightness), its mean grey (contrast) or greys (saturation)."""
    others: tuple[Callable, ...] = (np.zeros_like, lambda x: _grey(x).mean(), _grey)
    return factor * image + (1 - factor) * others[kind](image)


def _cut(images: np.ndarray, weight: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Swap a rectangle of area `1 - weight`, clipped to the image; the weight that is left."""
    height, width = images.shape[1:3]
    side = math.sqrt(1 - weight)
    h, w = int(height * side), int(width * side)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    rows = slice(max(0, y - h // 2), min(height, y + h // 2))
    columns = slice(max(0, x - w // 2), min(width, x + w // 2))
    mixed = images.copy()
    mixed[:, rows, columns] = images[::-1, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)
