"""Made-up examples with known answers."""

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PeriodicText:
    """Sequences of tokens that repeat their first `period` tokens, which are random.

    Attributes:
      count: examples.
      length: tokens of each.
      period: after how many tokens it repeats.
      vocab_size: tokens are below it, and not 0.
      seed: other seeds give other sequences.
    """

    count: int
    length: int = 32
    period: int = 4
    vocab_size: int = 32
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        start = rng.integers(1, self.vocab_size, self.period)
        return {"tokens": np.resize(start, self.length).astype(np.int32)}


@dataclass(frozen=True)
class MovingSquare:
    """Clips of a square that moves up, down, left or right; the class is the direction.

    It starts anywhere and comes back at the other side, over noise: one frame tells nothing.

    Attributes:
      count: examples.
      frames: of each clip.
      size: height and width in pixels.
      seed: other seeds give other clips.
    """

    count: int
    frames: int = 8
    size: int = 32
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        label = int(rng.integers(4))
        start, side = rng.integers(0, self.size, 2), self.size // 4
        step = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)][label]) * int(rng.integers(2, 4))
        clip = rng.integers(0, 64, (self.frames, self.size, self.size, 3), np.uint8)
        for i in range(self.frames):
            rows, columns = ((start + i * step)[:, None] + np.arange(side)) % self.size
            clip[i][np.ix_(rows, columns)] += 160
        return {"clip": clip, "label": label}


@dataclass(frozen=True)
class RingOfGaussians:
    """Points of the plane around the corners of a regular polygon, and latents to make them from.

    The usual first test of an adversarial model: one that collapses finds few of the corners.

    Attributes:
      count: examples.
      corners: of the polygon, whose radius is 1.
      spread: standard deviation around each.
      latent_dim: normal numbers of each example's `latents`.
      seed: other seeds give other points.
    """

    count: int
    corners: int = 8
    spread: float = 0.05
    latent_dim: int = 8
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        corner = self.centres()[rng.integers(self.corners)]
        point = corner + self.spread * rng.standard_normal(2)
        latents = rng.standard_normal(self.latent_dim)
        return {"points": point.astype(np.float32), "latents": latents.astype(np.float32)}

    def centres(self) -> np.ndarray:
        """The corners, `[corners, 2]`."""
        angle = 2 * np.pi * np.arange(self.corners) / self.corners
        return np.stack([np.cos(angle), np.sin(angle)], 1)


@dataclass(frozen=True)
class MarkovText:
    """Sequences of a Markov chain, whose entropy is known.

    Examples are `tokens [length]` and `entropy`, the mean over their places of the entropy of what
    comes next.

    Attributes:
      count: sequences.
      length: tokens of each.
      vocab_size: different ones.
      sharpness: of the chances: 0 is uniform.
      seed: other seeds give other sequences of the same chain.
    """

    count: int
    length: int = 32
    vocab_size: int = 16
    sharpness: float = 2.0
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    @functools.cached_property
    def chances(self) -> np.ndarray:
        """Of each token behind each."""
        scores = np.random.default_rng(7).normal(size=(self.vocab_size,) * 2) * self.sharpness
        chances = np.exp(scores - scores.max(1, keepdims=True))
        return chances / chances.sum(1, keepdims=True)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        below, tokens = np.cumsum(self.chances, 1), [int(rng.integers(self.vocab_size))]
        for draw in rng.random(self.length - 1):
            tokens.append(min(int(np.searchsorted(below[tokens[-1]], draw)), self.vocab_size - 1))
        entropy = -(self.chances * np.log(self.chances + 1e-30)).sum(1)
        return {"tokens": np.array(tokens, np.int32),
                "entropy": np.float32(entropy[tokens[:-1]].mean())}  # fmt: skip
