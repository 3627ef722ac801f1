"""Objects placed where a network wants them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from zoo.evaluators.evaluator import Evaluator, some_examples
from zoo.evaluators.pictures import enlarged, grid


@dataclass(frozen=True)
class PlacedObjects(Evaluator):
    """`placed.png`: background, object, heat map (bright is good) and the object in its best box.

    Sides of boxes are those of the held-out data's `sides()`, in pixels.

    Attributes:
      every: steps between pictures; 0 is at the end only.
      count: held-out examples.
    """

    every: int = 0
    count: int = 8

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; gives no number."""
        import jax

        batch = some_examples(data, list(range(self.count)))
        said = jax.device_get(program.predict(variables, batch))
        heat = said["heat_map"].min(1)
        low, high = (f((1, 2), keepdims=True) for f in (heat.min, heat.max))
        heat = 1 - (heat - low) / np.maximum(high - low, 1e-9)
        background, size = batch["background"], batch["background"].shape[1:3]
        heat = heat.repeat(size[0] // heat.shape[1], 1).repeat(size[1] // heat.shape[2], 2)
        placed = [
            place(*pair, box, data.eval.sides()[box[0]], said["heat_map"].shape[2:])
            for *pair, box in zip(
                background, batch["object_image"], said["boxes"][:, 0], strict=True
            )
        ]
        rows = background, batch["object_image"], heat[..., None], np.stack(placed)
        enlarged(grid(rows), 3).save(folder / "placed.png")
        return {}


def place(
    background: Float[np.ndarray, "height width 3"],
    object_image: Float[np.ndarray, "rows columns 3"],
    box: np.ndarray,
    side: int,
    cells: tuple[int, int],
) -> Float[np.ndarray, "height width 3"]:
    """The background with the object in a box, moved inside where it would stand out.

    Args:
      background: the picture.
      object_image: what is shrunk to the box.
      box: scale, row and column of the heat map's cell that has the middle.
      side: of the box in pixels.
      cells: rows and columns of the heat map.
    """
    out, size = background.copy(), background.shape[:2]
    corner = [
        int(np.clip((at + 0.5) * n / m - side / 2, 0, n - side))
        for at, n, m in zip(box[1:], size, cells, strict=True)
    ]
    rows, columns = (np.arange(side) * n // side for n in object_image.shape[:2])
    small = object_image[np.ix_(rows, columns)]
    out[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = small
    return out
