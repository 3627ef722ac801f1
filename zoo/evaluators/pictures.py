"""Pictures and clips for the eye: restored and generated images, forecast frames as a GIF."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from zoo.evaluators.evaluator import Evaluator, predictions, some_examples
from zoo.evaluators.features import ClassifierFeatures


def grid(
    rows: Sequence[Float[np.ndarray, "count height width channels"]],
) -> Float[np.ndarray, "high wide 3"]:
    """Rows of equally large images, white lines between, as uint8."""
    lines = []
    for row in rows:
        row = np.clip(np.asarray(row, np.float32), 0, 1)
        row = np.broadcast_to(row, (*row.shape[:-1], 3))
        row = np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
        lines.append(np.concatenate(list(row), 1))
    return np.round(np.concatenate(lines, 0) * 255).astype(np.uint8)


def enlarged(image: np.ndarray, times: int) -> Any:
    """A Pillow image with each pixel so many times as wide and high."""
    from PIL import Image

    return Image.fromarray(image.repeat(times, 0).repeat(times, 1))


def save_gif(path: Path, frames: Sequence[np.ndarray], times: int = 4, rate: float = 4.0) -> None:
    """An endless animation of uint8 frames `[height, width, 3]`."""
    first, *rest = (enlarged(frame, times) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)


@dataclass(frozen=True)
class RestoredImages(Evaluator):
    """`restored.png`: bicubic enlargement, the restored image and the truth, one above the other.

    Attributes:
      every: steps between pictures; 0 is at the end only.
      count: held-out examples, if there are so many.
    """

    every: int = 0
    count: int = 6

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; gives no number."""
        import jax

        batch = some_examples(data, list(range(min(self.count, len(data.eval)))))
        said = jax.device_get(program.predict(variables, batch))["image"]
        plain = jax.image.resize(batch["images"], said.shape, "bicubic")
        times = max(1, 96 // said.shape[1])
        enlarged(grid([plain, said, batch["target"]]), times).save(folder / "restored.png")
        return {}


@dataclass(frozen=True)
class ForecastClips(Evaluator):
    """`forecast.gif`: clips as they went on above, as they were forecast below.

    Attributes:
      every: steps between clips; 0 is at the end only.
      count: held-out examples.
    """

    every: int = 0
    count: int = 6

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; gives no number."""
        import jax

        batch = some_examples(data, list(range(self.count)))
        said = jax.device_get(program.predict(variables, batch))["frames"]
        truth = np.concatenate([batch["frames"], batch["target"]], 1)
        ours = np.concatenate([batch["frames"], said], 1)
        frames = [grid([truth[:, t], ours[:, t]]) for t in range(truth.shape[1])]
        save_gif(folder / "forecast.gif", frames)
        return {}


@dataclass(frozen=True)
class SampledClips(Evaluator):
    """`samples.gif`: held-out clips above, below what is sampled where they are masked.

    Attributes:
      every: steps between samples; 0 is at the end only.
      count: clips in the picture; the errors are of all held-out ones.
    """

    every: int = 0
    count: int = 6

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """The squared error of the masked part, and that of repeating the last frame before it."""
        said, truth, masks = [], [], []
        for batch, given in predictions(program, variables, data):
            said.append(given["samples"])
            truth.append(batch["latents"])
            masks.append(batch["mask"])
        said, truth, mask = (np.concatenate(x) for x in (said, truth, masks))
        pair = [(x[: self.count] + 1) / 2 for x in (truth, said)]
        save_gif(folder / "samples.gif", [grid([x[:, t] for x in pair])
                                          for t in range(truth.shape[1])])  # fmt: skip
        mask = mask[..., None]
        last = (1 - mask).reshape(*mask.shape[:2], -1).all(-1).argmin(1) - 1
        repeated = truth[np.arange(len(truth)), last][:, None]
        return {
            "sample_mse": float(((said - truth) ** 2 * mask).sum() / mask.sum()),
            "last_frame_mse": float(((repeated - truth) ** 2 * mask).sum() / mask.sum()),
        }


@dataclass(frozen=True)
class SampledImages(Evaluator):
    """`samples.png`: generated images below real ones; and how far apart both sets are.

    The distance is Fréchet's, as in FID (Heusel et al., arXiv 1706.08500), but of the features of a
    classifier of these very images in place of Inception's: it compares with the distance of real
    training images, not with published figures.

    Attributes:
      features: where the distance is measured.
      every: steps between pictures; 0 is at the end only.
      rows: of images of each kind, 16 in each.
    """

    features: ClassifierFeatures
    every: int = 0
    rows: int = 3

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """`distance` of generated images, `train_distance` of as many from the training set."""
        real, made = [], []
        for batch, said in predictions(program, variables, data):
            real.append(batch["images"])
            made.append(said["examples"])
        real, made = np.concatenate(real), np.concatenate(made)
        seen = [data.train[i]["images"] for i in range(min(len(real), len(data.train)))]
        lines = [(x[16 * i : 16 * (i + 1)] + 1) / 2 for x in (real, made) for i in range(self.rows)]
        enlarged(grid(lines), 3).save(folder / "samples.png")
        features = self.features.fitted()
        truth = features(real)
        return {
            "distance": frechet_distance(truth, features(made)),
            "train_distance": frechet_distance(truth, features(np.stack(seen))),
        }


def frechet_distance(
    real: Float[np.ndarray, "count width"], other: Float[np.ndarray, "others width"]
) -> float:
    """Between normal distributions like both sets of features.

    `|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`; the trace of the root is the sum of the roots of
    the eigenvalues.
    """
    real, other = (np.asarray(x, np.float64) for x in (real, other))
    means = ((real.mean(0) - other.mean(0)) ** 2).sum()
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, other))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0.0))
    return float(means + np.trace(first) + np.trace(second) - 2 * roots.sum())
