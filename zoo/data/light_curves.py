"""Light curves of irregular observations in several bands, interpolated by a Gaussian process.

The recipe of astronet (github.com/tallamjr/astronet, Apache-2.0; its fit runs in george):

    k((t, w), (t', w')) = A (1 + sqrt(3) r) exp(-sqrt(3) r)        Matern 3/2
    r^2 = (t - t')^2 / m + ((w - w') / 6000)^2                     w: wavelength in Angstrom

with errors of measurement on the diagonal and a mean of zero. It starts at a length of 20 days and
A = (scale / 2)^2, where scale is the flux of the most significant observation; log A and log m are
fitted by L-BFGS-B, the scale in wavelength is not. All of it is float64.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize
from jaxtyping import Float64

WAVELENGTHS = {"g": 4802.0, "i": 7542.0, "r": 6231.0, "u": 3685.0, "y": 9736.0, "z": 8690.0}
"""Of the bands of LSST, in the order of the official models' channels (alphabetical)."""
WIDTH = 6000.0
START, LONGEST = 20.0, 1000.0  # days


@dataclass(frozen=True)
class GaussianProcess:
    """A process given observations.

    Attributes:
      points: days and wavelength of each observation.
      flux: observed.
      error: standard deviation of each flux.
      parameters: log A and log m.
    """

    points: Float64[np.ndarray, "n 2"]
    flux: Float64[np.ndarray, "n"]
    error: Float64[np.ndarray, "n"]
    parameters: Float64[np.ndarray, "2"]

    def _solve(self, parameters: np.ndarray) -> tuple[tuple, np.ndarray]:
        covariance = kernel(self.points, self.points, parameters) + np.diag(self.error**2)
        factor = scipy.linalg.cho_factor(covariance, lower=True)
        return factor, scipy.linalg.cho_solve(factor, self.flux)

    def log_likelihood(self, parameters: Float64[np.ndarray, "2"] | None = None) -> float:
        """Of the observations; of other parameters than its own, if given."""
        factor, weights = self._solve(self.parameters if parameters is None else parameters)
        determinant = 2 * np.log(np.diag(factor[0])).sum()
        return -0.5 * float(
            self.flux @ weights + determinant + len(self.flux) * math.log(2 * math.pi)
        )

    def predict(
        self, points: Float64[np.ndarray, "m 2"]
    ) -> tuple[Float64[np.ndarray, "m"], Float64[np.ndarray, "m"]]:
        """Mean and standard deviation of the flux."""
        factor, weights = self._solve(self.parameters)
        cross = kernel(points, self.points, self.parameters)
        explained = np.einsum("mn,nm->m", cross, scipy.linalg.cho_solve(factor, cross.T))
        variance = math.exp(self.parameters[0]) - explained
        return cross @ weights, np.sqrt(np.maximum(variance, 0.0))


def kernel(
    a: Float64[np.ndarray, "n 2"], b: Float64[np.ndarray, "m 2"], parameters: np.ndarray
) -> Float64[np.ndarray, "n m"]:
    """Covariances of two sets of points."""
    days, bands = (a[:, None] - b[None]).transpose(2, 0, 1)
    r = np.sqrt(3.0 * (days**2 / math.exp(parameters[1]) + (bands / WIDTH) ** 2))
    return math.exp(parameters[0]) * (1 + r) * np.exp(-r)


def unfitted(
    points: Float64[np.ndarray, "n 2"],
    flux: Float64[np.ndarray, "n"],
    error: Float64[np.ndarray, "n"],
) -> GaussianProcess:
    """The process at the parameters that a fit starts from.

    Raises:
      ValueError: without observations, or where all fluxes are zero.
    """
    if not len(flux) or not np.any(flux):
        raise ValueError(
            f"A light curve of {len(flux)} observations, none with a flux, has no scale; drop it."
        )
    noise = np.sqrt(error**2 + (0.01 * np.max(flux)) ** 2)
    scale = abs(flux[np.argmax(np.abs(flux) / noise)])
    start = np.array([2 * math.log(0.5 * scale), 2 * math.log(START)])
    return GaussianProcess(points, flux, error, start)


def fit(
    points: Float64[np.ndarray, "n 2"],
    flux: Float64[np.ndarray, "n"],
    error: Float64[np.ndarray, "n"],
) -> GaussianProcess:
    """The process at the most likely parameters; at the first ones if no better are found."""
    process = unfitted(points, flux, error)
    amplitude = process.parameters[0]
    bounds = [(amplitude - 10, amplitude + 10), (0.0, 2 * math.log(LONGEST))]
    found = scipy.optimize.minimize(
        lambda p: -process.log_likelihood(p),
        process.parameters,
        method="L-BFGS-B",
        bounds=bounds,
        tol=1e-6,
    )
    better = found.success and -found.fun > process.log_likelihood()
    return GaussianProcess(points, flux, error, found.x) if better else process


def interpolate(
    process: GaussianProcess, wavelengths: list[float], count: int = 100
) -> Float64[np.ndarray, "count bands"]:
    """Mean fluxes at equal steps from the first observation to the last, in each band."""
    times = np.linspace(process.points[:, 0].min(), process.points[:, 0].max(), count)
    grid = [np.stack([times, np.full(count, w)], -1) for w in wavelengths]
    return np.stack([process.predict(points)[0] for points in grid], -1)


def around_detections(
    days: Float64[np.ndarray, "n"], detected: np.ndarray, margin: float = 50.0
) -> np.ndarray:
    """Which observations are within `margin` days of the first to the last detection.

    Raises:
      ValueError: if nothing was detected.
    """
    if not np.any(detected):
        raise ValueError("No observation of this light curve is a detection; drop it.")
    first, last = days[detected].min(), days[detected].max()
    return (days > first - margin) & (days < last + margin)
