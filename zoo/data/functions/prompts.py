"""Prompts of a function class as a source, with the curricula of the official code."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from zoo.data.loader import Data


class Prompt(NamedTuple):
    """Points and their labels; `targets` are the labels without what was done to them."""

    xs: Float[np.ndarray, "points dims"]
    ys: Float[np.ndarray, "points"]
    targets: Float[np.ndarray, "points"]


class FunctionClass(Protocol):
    """Draws a function and points."""

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function of `dims` numbers at so many points."""


@dataclass(frozen=True)
class Either:
    """One of several classes, each as likely, for every prompt."""

    classes: tuple[FunctionClass, ...]

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        return self.classes[rng.integers(len(self.classes))].sample(rng, points, dims)


@dataclass(frozen=True)
class Ramp:
    """A number that grows with the steps of training: `increment` every `interval`, up to `end`."""

    start: int
    end: int
    increment: int = 1
    interval: int = 2000

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"A ramp needs an interval of at least 1 step, not {self.interval}.")

    def at(self, step: int) -> int:
        """Its value in a step; the first is 0."""
        return min(self.start + step // self.interval * self.increment, self.end)


@dataclass(frozen=True)
class Prompts:
    """`count` prompts: `xs`, `ys`, `targets`, and `weights`, 1 where a point counts.

    All prompts have one shape. A curriculum over the dimension sets the other inputs to 0 before
    labels are made, as the official code does; one over the number of points takes the weight
    from those behind. The official code makes shorter prompts instead: the learners are causal,
    so that the points that count have the same predictions.

    Attributes:
      functions: what draws them.
      count: how many there are.
      points: of each.
      dims: size of an x.
      seed: other seeds give other prompts.
      batch_size: examples of a step, for the curricula.
      dims_ramp: how many inputs are not 0.
      points_ramp: how many points count.
    """

    functions: FunctionClass
    count: int
    points: int
    dims: int
    seed: int = 0
    batch_size: int = 64
    dims_ramp: Ramp | None = None
    points_ramp: Ramp | None = None
    ordered: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        step = index // self.batch_size
        dims = self.dims if self.dims_ramp is None else min(self.dims_ramp.at(step), self.dims)
        count = self.points if self.points_ramp is None else self.points_ramp.at(step)
        prompt = self.functions.sample(rng, self.points, dims)
        xs = np.zeros((self.points, self.dims), np.float32)
        xs[:, :dims] = prompt.xs
        return {
            "xs": xs,
            "ys": np.asarray(prompt.ys, np.float32),
            "targets": np.asarray(prompt.targets, np.float32),
            "weights": (np.arange(self.points) < count).astype(np.float32),
        }


def batch(source: Prompts, start: int, size: int) -> dict[str, np.ndarray]:
    """`size` prompts from `start` on, stacked."""
    prompts = [source[start + i] for i in range(size)]
    return {key: np.stack([prompt[key] for prompt in prompts]) for key in prompts[0]}


def prompt_data(
    functions: FunctionClass,
    *,
    points: int,
    dims: int,
    steps: int,
    batch_size: int = 64,
    held_out: int = 512,
    dims_ramp: Ramp | None = None,
    points_ramp: Ramp | None = None,
) -> Data:
    """Prompts for so many steps, none of them twice, and held-out ones without a curriculum."""
    shape = {"points": points, "dims": dims, "batch_size": batch_size}
    ramps = {"dims_ramp": dims_ramp, "points_ramp": points_ramp}
    return Data(
        train=Prompts(functions, steps * batch_size, **shape, **ramps),
        eval=Prompts(functions, held_out, **shape, seed=1),
        batch_size=batch_size,
        eval_batch_size=held_out // 2,
    )
