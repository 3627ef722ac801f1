"""How many modes of a known mixture a generator finds, and how far its samples are from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from zoo.evaluators.evaluator import Evaluator, predictions


@dataclass(frozen=True)
class ModesFound(Evaluator):
    """Modes of a `RingOfGaussians` near which there are samples, and how many samples are near any.

    Srivastava et al. (VEEGAN), arXiv 1705.07761, section 4.1: a sample is of high quality within
    three standard deviations of a mode; a mode is found if a sample of high quality is nearest to
    it. Draws samples and truth into `modes.png`.

    Attributes:
      every: steps between measurements; 0 is at the end only.
    """

    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """`modes` and `quality`, over as many samples as there are held-out examples."""
        truth, samples = [], []
        for batch, said in predictions(program, variables, data):
            truth.append(batch["points"])
            samples.append(said["examples"])
        truth, samples = np.concatenate(truth), np.concatenate(samples)
        found = modes_found(samples, data.eval.centres(), data.eval.spread)
        _draw(folder / "modes.png", truth, samples)
        return found


@dataclass(frozen=True)
class SampledPoints(Evaluator):
    """`distance`: sliced Wasserstein between sampled `latents` of the plane and held-out ones.

    Of a student, `teacher_distance` too. Draws both and the truth into `samples.png`.

    Attributes:
      every: steps between measurements; 0 is at the end only.
    """

    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """The distances, over as many samples as there are held-out examples."""
        truth, said = [], []
        for batch, given in predictions(program, variables, data):
            truth.append(batch["latents"])
            said.append(given)
        truth = np.concatenate(truth)
        names = {"samples": "distance", "teacher_samples": "teacher_distance"}
        samples = {n: np.concatenate([s[n] for s in said]) for n in names if n in said[0]}
        _draw(folder / "samples.png", truth, samples["samples"])
        return {names[n]: sliced_wasserstein(truth, x) for n, x in samples.items()}


def sliced_wasserstein(
    first: Float[np.ndarray, "count dims"], second: Float[np.ndarray, "count dims"], count: int = 64
) -> float:
    """The mean distance of sorted projections, over fixed random directions (Bonneel et al., 2015).

    Raises:
      ValueError: if there are more points of one than of the other.
    """
    if first.shape != second.shape:
        raise ValueError(f"Both sets need as many points: {first.shape} is not {second.shape}.")
    directions = np.random.default_rng(0).standard_normal((first.shape[1], count))
    directions /= np.linalg.norm(directions, axis=0)
    apart = np.sort(first @ directions, 0) - np.sort(second @ directions, 0)
    return float(np.sqrt((apart**2).mean(0)).mean())


def modes_found(
    samples: Float[np.ndarray, "count 2"], centres: Float[np.ndarray, "modes 2"], spread: float
) -> dict[str, float]:
    """The number of modes found, and the part of samples that are of high quality."""
    distance = np.linalg.norm(samples[:, None] - centres, axis=-1)
    good = distance.min(1) < 3 * spread
    found = len(np.unique(distance.argmin(1)[good]))
    return {"modes": float(found), "quality": float(good.mean())}


def _draw(path: Path, truth: np.ndarray, samples: np.ndarray) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(*truth.T, s=4, color="black", alpha=0.3, label="truth")
    axes.scatter(*samples.T, s=4, color="tab:red", alpha=0.5, label="generated")
    axes.set(aspect="equal")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
