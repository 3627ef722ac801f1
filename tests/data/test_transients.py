import numpy as np

from zoo.data.light_curves import WAVELENGTHS
from zoo.data.transients import KINDS, SyntheticTransients, flare, microlensing, supernova_ia


def test_a_curve_depends_on_seed_and_place_alone():
    source, again = SyntheticTransients(20), SyntheticTransients(20)
    first, second = source[3], again[3]
    assert first is source[3]
    assert first["series"].shape == (100, 6) and first["aux"].shape == (2,)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert not np.array_equal(first["series"], SyntheticTransients(20, seed=1)[3]["series"])


def test_curves_are_bright_and_only_galaxies_have_a_redshift():
    source = SyntheticTransients(24)
    seen = set()
    for i in range(len(source)):
        curve = source[i]
        far = KINDS[curve["label"]][1][1] > 0
        assert (curve["aux"][0] > 0) == far == (curve["aux"][1] > 0)
        assert 0.1 < np.abs(curve["series"]).max() < 3
        seen.add(curve["label"])
    assert seen == set(range(len(KINDS)))


def test_shapes_are_what_their_names_say():
    days = np.arange(250.0)
    rng = lambda: np.random.default_rng(0)  # noqa: E731
    blue, red = (np.full(250, WAVELENGTHS[band] / 6231) for band in "ui")
    lens = microlensing(rng(), 0.0, days, blue)
    np.testing.assert_array_equal(lens, microlensing(rng(), 0.0, days, red))
    peak = lens.argmax()
    np.testing.assert_allclose(lens[peak - 40 : peak], lens[peak + 40 : peak : -1], rtol=0.1)
    fades = [supernova_ia(rng(), 0.1, days, band)[-100:].sum() for band in (blue, red)]
    assert fades[0] < fades[1]
    assert (flare(rng(), 0.0, days, blue) > 0.1).sum() < 30
