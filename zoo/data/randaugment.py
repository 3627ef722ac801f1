"""RandAugment (Cubuk et al., arXiv 1909.13719) as DeiT and Swin use it.

The policy that timm calls `rand-m9-mstd0.5-inc1`: two operations an image, each drawn from fifteen
and applied with probability one half, at a magnitude drawn around 9 of 10; severity grows with
magnitude for every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from zoo.data.transforms import Example, from_pil, to_pil

FILL = (124, 116, 104)  # the mean colour of ImageNet, where geometry uncovers the border


@dataclass(frozen=True)
class RandAugment:
    """Random operations on a uint8 image (grey or RGB).

    Attributes:
      magnitude: mean of the magnitudes, of 10.
      deviation: their standard deviation; they are clipped to 0..10.
      operations: how many are drawn for an image, with repetition.
      probability: of each being applied.
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    operations: int = 2
    probability: float = 0.5

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        image = to_pil(example["image"])
        for choice in rng.integers(len(OPERATIONS), size=self.operations):
            if rng.random() < self.probability:
                level = float(np.clip(rng.normal(self.magnitude, self.deviation), 0, 10)) / 10
                image = OPERATIONS[choice](image, level, rng)
        return {**example, "image": from_pil(image)}


def _sign(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _affine(image: Image.Image, matrix: tuple[float, ...], rng: np.random.Generator) -> Image.Image:
    resample = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[rng.integers(2)]
    fill = FILL if image.mode == "RGB" else round(sum(FILL) / 3)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def _rotate(image, level, rng):
    angle = np.deg2rad(_sign(30 * level, rng))
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = image.width / 2, image.height / 2  # about the middle
    return _affine(image, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), rng)


def _shear_x(image, level, rng):
    return _affine(image, (1, _sign(0.3 * level, rng), 0, 0, 1, 0), rng)


def _shear_y(image, level, rng):
    return _affine(image, (1, 0, 0, _sign(0.3 * level, rng), 1, 0), rng)


def _translate_x(image, level, rng):
    return _affine(image, (1, 0, _sign(0.45 * level, rng) * image.width, 0, 1, 0), rng)


def _translate_y(image, level, rng):
    return _affine(image, (1, 0, 0, 0, 1, _sign(0.45 * level, rng) * image.height), rng)


def _enhance(kind) -> Callable:
    def apply(image, level, rng):
        return kind(image).enhance(max(0.1, 1 + _sign(0.9 * level, rng)))

    return apply


def _posterize(image, level, rng):
    bits = 4 - int(4 * level)
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def _solarize(image, level, rng):
    return ImageOps.solarize(image, 256 - min(256, int(256 * level)))


def _solarize_add(image, level, rng):
    add = min(128, int(110 * level))
    table = [min(255, i + add) if i < 128 else i for i in range(256)]
    return image.point(table * len(image.getbands()))


OPERATIONS: tuple[Callable, ...] = (
    lambda image, level, rng: ImageOps.autocontrast(image),
    lambda image, level, rng: ImageOps.equalize(image),
    lambda image, level, rng: ImageOps.invert(image),
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
