import math

import numpy as np
import pytest

from zoo.evaluators.conformal import covered, near_radii, radius


def test_the_radius_is_the_conformal_quantile():
    errors = np.arange(1.0, 20.0) * np.resize([1, -1], 19)
    assert radius(errors, 0.9) == 18.0  # ceil(20 * 0.9)
    assert radius(errors, 0.95) == 19.0
    assert radius(errors, 0.96) == math.inf


def test_a_coverage_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"coverage=90 is no probability; choose one such as 0\.9"):
        radius(np.ones(3), 90)


def test_intervals_cover_what_they_promise_at_every_key():
    """Errors that grow with the key: one radius for all fails, windows do not."""
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 9, 8000)
    errors = rng.standard_normal(8000) * keys**2
    calibrated, held_out = slice(4000), slice(4000, None)
    zeros = np.zeros(4000)
    radii = near_radii(errors[calibrated], keys[calibrated], keys[held_out], 0.9)
    one = np.full(4000, radius(errors[calibrated], 0.9))
    for n in range(1, 9):
        at = keys[held_out] == n
        local = covered(errors[held_out][at], zeros[at], radii[at])
        assert 0.86 < local < 0.94
    few = keys[held_out] == 1
    assert covered(errors[held_out][few], zeros[few], one[few]) == 1.0
    assert 0.87 < covered(errors[held_out], zeros, radii) < 0.93


def test_windows_grow_until_they_hold_enough():
    keys = np.array([1, 1, 5, 5, 9, 9])
    errors = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(near_radii(errors, keys, np.array([1, 9]), 0.5, 2), [2.0, 6.0])
    assert near_radii(errors, keys, np.array([1]), 0.5, 4)[0] == 3.0
