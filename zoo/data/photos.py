"""Photographs that come with scikit-learn, cut and shrunk for super-resolution."""

import functools
from dataclasses import dataclass

import numpy as np


@functools.cache
def photo(name: str) -> np.ndarray:
    """`china` or `flower`: uint8 `[427, 640, 3]`.

    Raises:
      ValueError: for another name.
    """
    from sklearn.datasets import load_sample_image

    if name not in ("china", "flower"):
        raise ValueError(f"There is no photo {name!r}; there are 'china' and 'flower'.")
    return load_sample_image(f"{name}.jpg")


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
        from PIL import Image

        rng = np.random.default_rng((self.seed, index))
        pixels, side = photo(self.name), self.size * self.scale
        top, left = (int(rng.integers(n - side + 1)) for n in pixels.shape[:2])
        patch = pixels[top : top + side, left : left + side]
        if self.turn:
            patch = np.rot90(patch, int(rng.integers(4)))
            patch = patch[:, ::-1] if rng.integers(2) else patch
        small = Image.fromarray(np.ascontiguousarray(patch))
        small = np.asarray(small.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return {"images": small.astype("f") / 255, "target": patch.astype("f") / 255}
