import math
from fractions import Fraction

import numpy as np
import pytest

from zoo.data.intersection import (
    IntersectionNumbers,
    airy_b,
    airy_rows,
    dilaton_equation,
    exponents,
    genus,
    intersection_number,
    large_genus_ratio,
    logarithm,
    string_equation,
    virasoro,
)

TABLE = {
    (2, 3): "29/5760",
    (2, 2, 2): "7/240",
    (2, 6): "77/414720",
    (3, 5): "503/1451520",
    (4, 4): "607/1451520",
    (2, 3, 4): "1121/241920",
    (2,) * 6: "1225/144",
    (5, 6): "487/18579456",
    (2,) * 9: "1816871/48",
    (2,) * 12: "7723802625/8",
}


@pytest.mark.parametrize("d", TABLE)
def test_published_numbers(d):
    assert intersection_number(d) == Fraction(TABLE[d])


@pytest.mark.parametrize("g", [1, 2, 3, 5, 12])
def test_one_marked_point_has_a_closed_form(g):
    assert intersection_number((3 * g - 2,)) == Fraction(1, 24**g * math.factorial(g))


def test_genus_zero_is_multinomial():
    for d in exponents(0, 7):
        wanted = math.factorial(4) // math.prod(math.factorial(e) for e in d)
        assert intersection_number(d) == wanted


def test_every_recursion_gives_the_same_number():
    seen = 0
    for g, n in ((1, 3), (2, 3), (3, 4)):
        for d in exponents(g, n):
            wanted = intersection_number(d)
            for i, e in enumerate(d):
                rest = d[:i] + d[i + 1 :]
                if e == 0:
                    assert string_equation(rest) == wanted
                else:
                    assert virasoro(e, rest) == wanted
                if e == 1:
                    assert dilaton_equation(rest) == wanted
                seen += 1
    assert seen > 100


def test_the_order_of_the_points_does_not_matter():
    assert intersection_number((4, 2, 3)) == intersection_number((3, 4, 2))


@pytest.mark.parametrize("d", [(2, 2), (0, 0), (), (-1, 5)])
def test_the_wrong_dimension_gives_zero(d):
    assert genus(d) is None and intersection_number(d) == 0


def test_exponents_are_all_of_them_once():
    found = list(exponents(3, 4))
    assert len(found) == len(set(found)) == 23  # partitions of 10 into at most 4 parts
    assert all(sum(d) == 9 + 1 and tuple(sorted(d, reverse=True)) == d for d in found)


def test_high_genus_approaches_the_asymptotic_value():
    ratios = [large_genus_ratio((3 * g - 2,)) for g in (5, 10, 20)]
    np.testing.assert_allclose(ratios, [0.906, 0.953, 0.976], atol=1e-3)
    with pytest.raises(ValueError, match=r"dimension of exponents \(2, 2\)"):
        large_genus_ratio((2, 2))


def test_logarithms_of_numbers_beyond_floats():
    assert logarithm(Fraction(10**400, 3)) == pytest.approx(400 * math.log(10) - math.log(3))


def test_examples_hold_every_number_of_the_genera():
    source = IntersectionNumbers((1, 2), 3, 26)
    assert len(source) == (1 + 2 + 3) + (1 + 3 + 7)
    example = source[len(source) - 1]
    assert example["exponents"].tolist() == [2, 2, 2]
    assert example["sizes"].tolist() == [2, 3] and example["group"] == 3
    assert example["target"] == pytest.approx(math.log(7 / 240))
    entries = airy_b(6)
    count = len(entries)
    np.testing.assert_array_equal(example["airy"][:count, :3], entries[:, :3])
    np.testing.assert_allclose(np.expm1(example["airy"][:count, 3]) / 100, entries[:, 3], rtol=1e-5)
    assert count == airy_rows(2, 3) and not example["airy"][count:].any()


def test_a_bound_of_the_euler_characteristic_leaves_a_low_genus_more_points():
    source = IntersectionNumbers((1, 2), 5, airy_rows(2, 2), euler=4)
    sizes = {tuple(source[i]["sizes"].astype(int).tolist()) for i in range(len(source))}
    assert sizes == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)}
    assert source[0]["exponents"].shape == (5,)


def test_data_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="rows=24 do not hold the 25 entries of B in genus 2"):
        IntersectionNumbers((1, 2), 3, 24)
    with pytest.raises(ValueError, match=r"euler=0 leaves no number of genera=\(1, 2\); raise it"):
        IntersectionNumbers((1, 2), 3, 24, euler=0)
    with pytest.raises(ValueError, match=r"genera=\(0, 1\) need to be positive"):
        IntersectionNumbers((0, 1), 3, 24)
