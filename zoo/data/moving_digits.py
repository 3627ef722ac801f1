"""Moving digits: clips of handwritten digits that fly about, as Moving MNIST makes them."""

import functools
from dataclasses import dataclass

import numpy as np

from zoo.data.sources import Digits


@functools.cache
def digit_shapes(split: str) -> np.ndarray:
    """Digits enlarged to `[count, 16, 16]`, float32 in [0, 1]."""
    digits = Digits(split)
    small = np.stack([digits[i]["image"] for i in range(len(digits))]).reshape(-1, 8, 8)
    return small.repeat(2, 1).repeat(2, 2).astype("f") / 255


@dataclass(frozen=True)
class MovingDigits:
    """Digits that move straight on and bounce off the borders, brighter where they overlap.

    Examples are `frames [time, size, size, 1]` and `target`, the frames that follow, float32 in
    [0, 1]. Positions are whole pixels; speeds are one to three of them a frame on each axis.

    Attributes:
      count: examples.
      frames: of each half.
      size: height and width in pixels, at least 17.
      digits: in a clip.
      split: of scikit-learn's digits, "train" or "test".
      seed: other seeds give other clips.
    """

    count: int
    frames: int = 4
    size: int = 32
    digits: int = 1
    split: str = "train"
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        shapes, room = digit_shapes(self.split), self.size - 16
        clip = np.zeros((2 * self.frames, self.size, self.size, 1), "f")
        for _ in range(self.digits):
            shape = shapes[rng.integers(len(shapes))]
            at, step = rng.integers(0, room + 1, 2), rng.integers(1, 4, 2) * rng.choice([-1, 1], 2)
            for frame in clip:
                y, x = at
                place = frame[y : y + 16, x : x + 16, 0]
                np.maximum(place, shape, out=place)
                over = (at + step < 0) | (at + step > room)
                step = np.where(over, -step, step)
                at = np.clip(at + step, 0, room)
        return {"frames": clip[: self.frames], "target": clip[self.frames :]}


@dataclass(frozen=True)
class MaskedClips:
    """Clips for a diffusion model that learns tasks as masks, from -1 to 1.

    Examples are `latents [time, size, size, 1]` and `mask [time, size, size]`, 1 where a clip is
    to be made.

    Attributes:
      clips: where they come from.
      task: what is masked, one of `zoo.models.video.vdt.MASKS`; None: at random, as in training.
    """

    clips: MovingDigits
    task: str | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        from zoo.models.video.vdt import frame_mask, random_mask

        example = self.clips[index]
        clip = np.concatenate([example["frames"], example["target"]])
        rng = np.random.default_rng((self.clips.seed, index, 1))
        size, given = clip.shape[:3], self.clips.frames
        if self.task is None:
            mask = random_mask(size, rng, given=given)
        else:
            mask = frame_mask(self.task, size, rng, given=given)
        return {"latents": 2 * clip - 1, "mask": mask}
