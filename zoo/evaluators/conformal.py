"""Prediction intervals with a guaranteed coverage, from errors on held-out examples.

Split conformal prediction: where calibration examples and the new one are exchangeable, the new
truth lies within `radius` of its prediction with a probability of at least `coverage`, whatever
the model is.
"""

import math

import numpy as np
from jaxtyping import Float, Real


def radius(errors: Float[np.ndarray, "m"], coverage: float = 0.9) -> float:
    """The `ceil((m + 1) coverage)`-th smallest absolute error; inf where m is too small for it.

    Raises:
      ValueError: if `coverage` is not between 0 and 1.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage={coverage} is no probability; choose one such as 0.9.")
    rank = math.ceil((len(errors) + 1) * coverage)
    return float(np.sort(np.abs(errors))[rank - 1]) if rank <= len(errors) else math.inf


def near_radii(
    errors: Float[np.ndarray, "m"],
    keys: Real[np.ndarray, "m"],
    wanted: Real[np.ndarray, "k"],
    coverage: float = 0.9,
    least: int = 100,
) -> Float[np.ndarray, "k"]:
    """A radius for each wanted key, from the calibration examples with keys nearest to it.

    The window `|key - wanted| <= w` grows until it holds `least` examples, or all there are: errors
    of DynamicFormer grow with the number of marked points, and one radius for all would cover few
    points too often and many too rarely.
    """
    distance = np.abs(np.asarray(keys)[None] - np.asarray(wanted)[:, None])
    width = np.sort(distance, 1)[:, min(least, len(errors)) - 1, None]
    return np.array([radius(errors[row], coverage) for row in distance <= width])


def covered(
    truth: Float[np.ndarray, "k"], prediction: Float[np.ndarray, "k"], radii: Float[np.ndarray, "k"]
) -> float:
    """The part of truths within their intervals."""
    return float(np.mean(np.abs(truth - prediction) <= radii))
