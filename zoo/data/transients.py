"""Made-up light curves of transients and variables: observed rarely, interpolated as real ones are.

Six kinds with shapes and colours like their names, no more: a stand-in for PLAsTiCC, whose curves
are not in any package. Each is seen at irregular times in the six bands of LSST, with noise, cut
around its detections, and interpolated by a Gaussian process (`zoo.data.light_curves`).
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.data.light_curves import WAVELENGTHS, around_detections, fit, interpolate

SEASON = 250.0  # days
NOISE = 4.0
BRIGHTEST = 100.0
DETECTED = 5.0  # deviations of the noise


def supernova_ia(rng: np.random.Generator, z: float, days: np.ndarray, red: np.ndarray) -> Any:
    """A peak that fades within weeks, blue first, and a second one in red bands."""
    t = (days - rng.uniform(60, 190)) / (1 + z)
    main = np.where(t < 0, np.exp(-0.5 * (t / 7) ** 2), np.exp(-t / (16 * red**1.2)))
    return main + 0.4 * (red > 1.15) * np.exp(-0.5 * ((t - 26) / 7) ** 2)


def supernova_iip(rng: np.random.Generator, z: float, days: np.ndarray, red: np.ndarray) -> Any:
    """A plateau of three months in red bands; blue ones fade during it."""
    t = (days - rng.uniform(40, 110)) / (1 + z)
    plateau = np.exp(-t * np.maximum(1.3 - red, 0.02) / 12) / (1 + np.exp((t - 95) / 5))
    return np.where(t < 0, np.exp(-0.5 * (t / 4) ** 2), plateau)


def active_galaxy(rng: np.random.Generator, z: float, days: np.ndarray, red: np.ndarray) -> Any:
    """A damped random walk, smaller in red bands."""
    order = np.argsort(days)
    kept = np.exp(-np.diff(days[order], prepend=days[order][0]) / (60 * (1 + z)))
    level, walk = rng.standard_normal(), np.empty(len(days))
    for i, k in zip(order, kept, strict=True):
        level = k * level + np.sqrt(1 - k**2) * rng.standard_normal()
        walk[i] = level
    return 0.5 * walk / red**0.7


def microlensing(rng: np.random.Generator, z: float, days: np.ndarray, red: np.ndarray) -> Any:
    """Light bent by a mass that passes: symmetric, the same in all bands."""
    nearest, width = rng.uniform(0.1, 0.6), rng.uniform(15, 50)
    u2 = nearest**2 + ((days - rng.uniform(70, 180)) / width) ** 2
    gain = lambda u2: (u2 + 2) / np.sqrt(u2 * (u2 + 4)) - 1  # noqa: E731
    return gain(u2) / gain(nearest**2)


def long_period(rng: np.random.Generator, z: float, days: np.ndarray, red: np.ndarray) -> Any:
    """A star that pulses for ever, more in red bands."""
    return 0.6 * red * np.sin(2 * np.pi * (days / rng.uniform(60, 150) + rng.random()))


def flare(rng: np.random.Generator, z: float, days: np.ndarray, red: np.ndarray) -> Any:
    """Up at once and gone within days, blue."""
    t = days - rng.uniform(60, 190)
    return np.where(t < 0, 0, np.exp(-np.maximum(t, 0) / rng.uniform(3, 8))) / red


KINDS = (
    (supernova_ia, (0.05, 0.5)),
    (supernova_iip, (0.03, 0.2)),
    (active_galaxy, (0.3, 2.0)),
    (microlensing, (0.0, 0.0)),
    (long_period, (0.0, 0.0)),
    (flare, (0.0, 0.0)),
)
"""A class number -> the shape of its light, and the range of its redshift (0: in our galaxy)."""


@dataclass(frozen=True)
class SyntheticTransients:
    """Light curves `series [times, 6]`, `aux [2]` (redshift of the host and its error), `label`.

    Fluxes are scaled so that the brightest is near 1; bands are in the order of `WAVELENGTHS`. A
    curve is made, and its process fitted, when it is first asked for.

    Attributes:
      count: curves.
      seed: other seeds give other curves.
      observations: of a curve, over all bands; those far from detections are dropped.
      times: equal steps of a curve, from its first observation to its last.
    """

    count: int
    seed: int = 0
    observations: int = 60
    times: int = 100

    @functools.cached_property
    def _made(self) -> dict[int, dict[str, Any]]:
        return {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def _make(self, index: int) -> dict[str, Any]:
        for attempt in range(100):  # until something is detected
            rng = np.random.default_rng((self.seed, index, attempt))
            label = int(rng.integers(len(KINDS)))
            shape, redshifts = KINDS[label]
            z = rng.uniform(*redshifts)
            days = np.sort(rng.uniform(0, SEASON, self.observations))
            wavelengths = rng.choice(list(WAVELENGTHS.values()), self.observations)
            flux = BRIGHTEST * rng.uniform(0.4, 1) * shape(rng, z, days, wavelengths / 6231.0)
            flux = flux + NOISE * rng.standard_normal(len(days))
            seen = np.abs(flux) > DETECTED * NOISE
            if seen.any() and (kept := around_detections(days, seen)).sum() >= 5:
                break
        points = np.stack([days[kept] - days[kept].min(), wavelengths[kept]], -1)
        process = fit(points, flux[kept], np.full(kept.sum(), NOISE))
        curve = interpolate(process, list(WAVELENGTHS.values()), self.times) / BRIGHTEST
        error = 0.03 * (1 + z) if z else 0.0
        host = max(z + error * rng.standard_normal(), 0.0)
        return {
            "series": curve.astype(np.float32),
            "aux": np.array([host, error], np.float32),
            "label": label,
        }
