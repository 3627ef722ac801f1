"""Pictures with an object in its place, made from scikit-learn's photos and handwritten digits."""

from dataclasses import dataclass

import numpy as np

from zoo.data.moving_digits import digit_shapes
from zoo.data.photos import photo

COLOURS = np.float32([[0.9, 0.2, 0.2], [0.2, 0.8, 0.25], [0.25, 0.35, 0.95], [0.9, 0.85, 0.2]])


@dataclass(frozen=True)
class Compositions:
    """A photo with two plain squares; an object, a digit on a tile, belongs on that of its colour.

    As where an object is cut out of a picture and the hole is filled: what remains around it says
    where it was, and the square's side how large. The other square has another colour, so half of
    the boxes are found without a look at the object.

    Examples are `background` and `object_image [size, size, 3]`, float32 in [0, 1], and `box`: the
    scale, row and column of the cell, of `cells` a side, in which the object's centre is.

    Attributes:
      count: examples.
      size: of both pictures, in pixels.
      scales: how many sides a box may have, see `sides`.
      cells: of the heat map, a side.
      name: of the photo, see `zoo.data.photos.photo`.
      split: of scikit-learn's digits, "train" or "test".
      seed: other seeds give other examples.
    """

    count: int
    size: int = 32
    scales: int = 4
    cells: int = 16
    name: str = "china"
    split: str = "train"
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def sides(self) -> np.ndarray:
        """Sides of boxes in pixels, from a seventh to under a half of the picture's."""
        return np.round(np.geomspace(0.15, 0.45, self.scales) * self.size).astype(int)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        pixels = photo(self.name)
        top, left = (int(rng.integers(n - self.size + 1)) for n in pixels.shape[:2])
        background = pixels[top : top + self.size, left : left + self.size].astype("f") / 255
        colours = COLOURS[rng.permutation(len(COLOURS))[:2]]
        scales = rng.integers(self.scales, size=2)
        sides = self.sides()[scales]
        while True:  # both are whole and apart
            places = np.stack([rng.integers(0, self.size - side + 1, 2) for side in sides])
            if (np.abs(np.diff(2 * places + sides[:, None], axis=0)) >= sides.sum()).any():
                break
        for colour, side, (row, column) in zip(colours, sides, places, strict=True):
            background[row : row + side, column : column + side] = colour
        shapes = digit_shapes(self.split)
        shape = shapes[rng.integers(len(shapes))]
        at = np.arange(self.size) * len(shape) // self.size
        tile = colours[0] * (1 - 0.8 * shape[np.ix_(at, at)][..., None])
        centre = (places[0] + sides[0] / 2) * self.cells / self.size
        box = np.array([scales[0], *centre.astype(int)], np.int32)
        return {"background": background, "object_image": tile.astype("f"), "box": box}
