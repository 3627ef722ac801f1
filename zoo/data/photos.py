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


@functools.cache
def _pair(name: str, zoom: float, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo at so much of its size, shrunk by `scale` and cut to a multiple of it."""
    from PIL import Image

    pixels = photo(name)
    if zoom != 1:
        size = round(pixels.shape[1] * zoom), round(pixels.shape[0] * zoom)
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    height, width = (n - n % scale for n in pixels.shape[:2])
    pixels = pixels[:height, :width]
    return shrunk(pixels, scale), pixels


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
    """Square patches of a photo, flipped and turned, and the same places of the shrunk photo.

    Examples are `images [size, size, 3]` and `target [size * scale, size * scale, 3]`, float32
    in [0, 1].

    Attributes:
      count: examples.
      name: of the photo, see `photo`.
      size: of the small patch, in pixels.
      scale: how much larger the target is.
      seed: other seeds give other patches.
      turn: flip and turn patches at random.
      zooms: the photo also as if it were taken from further away, shrunk to so much of its size;
        patches come from all of them, as often as each has pixels. Shrunk photos are sharper: they
        show what a photo's own pixels are too blurred to show.
      recolour: channels in any order, each at random brighter or darker, weaker or inverted, alike
        in both images: one photo has not the colours of all.
    """

    count: int
    name: str = "china"
    size: int = 16
    scale: int = 2
    seed: int = 0
    turn: bool = True
    zooms: tuple[float, ...] = (1.0,)
    recolour: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        pairs = [_pair(self.name, zoom, self.scale) for zoom in self.zooms]
        pixels = np.array([target.size for _, target in pairs])
        small, large = pairs[rng.choice(len(pairs), p=pixels / pixels.sum())]
        top, left = (int(rng.integers(n - self.size + 1)) for n in small.shape[:2])
        images, target = (
            x[top * s : (top + self.size) * s, left * s : (left + self.size) * s]
            for x, s in ((small, 1), (large, self.scale))
        )
        if self.turn:
            turns, flip = int(rng.integers(4)), int(rng.integers(2))
            images, target = (np.rot90(x, turns)[:, :: -1 if flip else 1] for x in (images, target))
        images, target = (x.astype("f") / 255 for x in (images, target))
        if self.recolour:
            order, inverted = rng.permutation(3), rng.integers(2, size=3)
            ends = np.stack([rng.uniform(0, 0.35, 3), rng.uniform(0.65, 1, 3)]).astype("f")
            black, white = np.where(inverted, ends[::-1], ends)
            images, target = (black + (white - black) * x[..., order] for x in (images, target))
        return {"images": images, "target": target}
