"""Linear functions with noise of unknown size, and shifts away from what was trained on.

For Liu et al., arXiv 2405.15115: a prompt has one w and one sigma. Tests change the tasks (sigma,
or the size of w), the inputs (their deviation), or the length of the prompt.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from zoo.data.functions.prompts import Prompt


@dataclass(frozen=True)
class NoisyLinear:
    """`y = w . x + sigma eps`, with sigma one of several.

    Attributes:
      sigmas: as likely as each other.
      tau: deviation of the weights.
      deviations: of the inputs: each prompt has one of them, as likely as each other.
      pool: how many functions there are at all; None: every prompt has a new one.
      pool_seed: other seeds give other pools.
    """

    sigmas: tuple[float, ...] = (0.1, 1.0)
    tau: float = 1.0
    deviations: tuple[float, ...] = (1.0,)
    pool: int | None = None
    pool_seed: int = 0

    def task(self, number: int, dims: int) -> tuple[Float[np.ndarray, "dims"], float]:
        """Weights and deviation of a function of the pool."""
        rng = np.random.default_rng((self.pool_seed, number))
        return self._draw(rng, dims)

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        if self.pool is None:
            weights, sigma = self._draw(rng, dims)
        else:
            weights, sigma = self.task(int(rng.integers(self.pool)), dims)
        xs = rng.choice(self.deviations) * rng.standard_normal((points, dims))
        targets = xs @ weights
        return Prompt(xs, targets + sigma * rng.standard_normal(points), targets)

    def _draw(self, rng, dims):
        return self.tau * rng.standard_normal(dims), float(rng.choice(self.sigmas))
