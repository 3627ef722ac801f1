"""Transitions as they were, as interpolation has them, and as a network fills them in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from zoo.evaluators.evaluator import Evaluator, some_examples
from zoo.motion.skeleton import Skeleton


@dataclass(frozen=True)
class FilledGaps(Evaluator):
    """`gaps.gif`: held-out windows of a task `MotionCompletion`, one after the other.

    Attributes:
      count: windows.
      every: steps of training between animations; 0 is at the end only.
    """

    count: int = 6
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; measures nothing."""
        import jax

        from zoo.motion import skeleton

        body, rate = program.task.body, program.task.rate
        batch = some_examples(data, list(range(min(self.count, len(data.eval)))))
        start, stop = batch["start"], batch["stop"]
        rows = {
            "as it was": batch["motion"],
            "interpolated": jax.vmap(skeleton.interpolated)(batch["motion"], start, stop),
            "network": program.predict(variables, batch)["motion"],
        }
        places = {name: np.asarray(skeleton.joints(body, x, skeleton.track(x, rate)))
                  for name, x in jax.device_get(rows).items()}  # fmt: skip
        frame = np.arange(batch["motion"].shape[1])
        unknown = (frame >= start[:, None]) & (frame < stop[:, None])
        save_gaps(folder / "gaps.gif", body, places, unknown)
        return {}


def save_gaps(
    path: Path,
    body: Skeleton,
    places: Mapping[str, Float[np.ndarray, "windows frames joints 3"]],
    unknown: Bool[np.ndarray, "windows frames"],
    size: int = 200,
) -> None:
    """Bodies side by side, from the front and to the side; those of unknown frames are red.

    Args:
      path: of the file.
      body: whose bones are drawn.
      places: of the joints at 30 frames a second, by what is written above.
      unknown: which frames were filled in.
      size: of each picture, in pixels.
    """
    from PIL import Image, ImageDraw

    pictures, scale = [], size / 2.4
    for window, hidden in enumerate(unknown):
        for frame, red in enumerate(hidden):
            picture = Image.new("RGB", (size * len(places), size), "white")
            draw = ImageDraw.Draw(picture)
            for i, (name, joints) in enumerate(places.items()):
                pose = joints[window, frame]
                middle = joints[window, :, 0, [0, 2]].mean(1)  # of the window, so that it moves
                x = 0.75 * (pose[:, 0] - middle[0]) + 0.66 * (pose[:, 2] - middle[1])
                flat = np.stack([size * (i + 0.5) + scale * x, size * 0.9 - scale * pose[:, 1]], 1)
                draw.text((size * i + 6, 4), name, fill="gray")
                color = "red" if red and i else "black"
                for joint, parent in enumerate(body.parents):
                    if parent >= 0:
                        ends = [tuple(map(float, flat[at])) for at in (parent, joint)]
                        draw.line(ends, fill=color, width=2)
            pictures.append(picture)
    first, *rest = pictures
    first.save(path, save_all=True, append_images=rest, duration=60, loop=0)
