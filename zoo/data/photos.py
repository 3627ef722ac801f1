"""Photographs that come with scikit-learn and Matplotlib, cut and shrunk for super-resolution."""

import functools
from dataclasses import dataclass

import numpy as np


@functools.cache
def photo(name: str) -> np.ndarray:
    """`china` or `flower`, uint8 `[427, 640, 3]`, or `hopper`, a portrait, `[600, 512, 3]`.

    Raises:
      ValueError: for another name.
    """
    from PIL import Image

    if name == "hopper":
        from matplotlib.cbook import get_sample_data

        with get_sample_data("grace_hopper.jpg") as file:
            return np.asarray(Image.open(file).convert("RGB"))
    if name not in ("china", "flower"):
        raise ValueError(f"There is no photo {name!r}; there are 'china', 'flower' and 'hopper'.")
    from sklearn.datasets import load_sample_image

    return load_sample_image(f"{name}.jpg")


def shrunk(pixels: np.ndarray, scale: int) -> np.ndarray:
    """An image, uint8, of sides that are multiples of `scale`, by bicubic averaging."""
    from PIL import Image

    height, width = pixels.shape[0] // scale, pixels.shape[1] // scale
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _example(pixels: np.ndarray, scale: int) -> dict[str, np.ndarray]:
    small = shrunk(pixels, scale)
    return {"images": small.astype("f") / 255, "target": pixels.astype("f") / 255}


@dataclass(frozen=True)
class Photos:
    """The middle of photos, and the same shrunk: what figures of super-resolution are of.

    PSNR is a figure of images, not of patches: the mean over patches counts empty sky, in which
    there is nothing to restore, as much as all else together.

    Attributes:
      names: of the photos, see `photo`.
      size: height and width of the small image, in pixels.
      scale: how much larger the target is.
    """

    names: tuple[str, ...]
    size: tuple[int, int] = (208, 256)
    scale: int = 2

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pixels = photo(self.names[index])
        sides = [self.scale * side for side in self.size]
        top, left = ((n - side) // 2 for n, side in zip(pixels.shape[:2], sides, strict=True))
        if min(top, left) < 0:
            raise ValueError(
                f"The photo {self.names[index]!r} is {pixels.shape[0]}x{pixels.shape[1]}; "
                f"size={self.size} at scale={self.scale} needs {sides[0]}x{sides[1]}."
            )
        return _example(pixels[top : top + sides[0], left : left + sides[1]], self.scale)


@dataclass(frozen=True)
class PhotoPatches:
    """Square patches of a photo, flipped and turned, and the same shrunk by bicubic averaging.

    Examples are `images [size, size, 3]` and `target [size * scale, size * scale, 3]`, float32
    in [0, 1].

    Attributes:
      count: examples.
      name: of the photo, see `photo`.
      size: of the small patch, in pixels.
      scale: how much larger the target is.
      seed: other seeds give other patches.
      turn: flip and turn patches at random.
    """

    count: int
    name: str = "china"
    size: int = 16
    scale: int = 2
    seed: int = 0
    turn: bool = True

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        pixels, side = photo(self.name), self.size * self.scale
        top, left = (int(rng.integers(n - side + 1)) for n in pixels.shape[:2])
        patch = pixels[top : top + side, left : left + side]
        if self.turn:
            patch = np.rot90(patch, int(rng.integers(4)))
            patch = patch[:, ::-1] if rng.integers(2) else patch
        return _example(patch, self.scale)
