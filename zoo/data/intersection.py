"""Intersection numbers of psi classes on moduli spaces of curves, exactly.

    <tau_d1 ... tau_dn>_g = integral over Mbar_{g,n} of psi_1^d1 ... psi_n^dn,   sum d = 3g - 3 + n

They are rational, and follow from <tau_0^3>_0 = 1 and <tau_1>_1 = 1/24 by the string and dilaton
equations and the recursion of Dijkgraaf, Verlinde and Verlinde (the Virasoro constraints that
Kontsevich proved Witten's conjecture with). DynamicFormer (Hashemi et al., "Can Transformers Do
Enumerative Geometry?", ICLR 2025, arXiv 2408.14915) learns their logarithms from the quantum Airy
structure below. Its repository (github.com/Baran-phys/DynamicFormer, MIT) has a generator whose
general recursion keeps only the last pair (a, b); of it we follow the normalisation alone.

>>> intersection_number((2, 3))
Fraction(29, 5760)
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float64


@functools.cache
def odd_factorial(n: int) -> int:
    """N!! of an odd n: 1 * 3 * ... * n; 1 for n = -1."""
    return 1 if n < 2 else n * odd_factorial(n - 2)


def genus(d: Sequence[int]) -> int | None:
    """The genus in which these exponents have the right dimension; None if there is none."""
    threefold = sum(d) + 3 - len(d)
    g = threefold // 3
    stable = threefold % 3 == 0 and g >= 0 and 2 * g - 2 + len(d) > 0
    return g if stable and len(d) and min(d) >= 0 else None


def intersection_number(d: Sequence[int]) -> Fraction:
    """<tau_d1 ... tau_dn> in the one genus where it may be other than 0; 0 if there is none.

    The work grows with the number of different sub-multisets of `d`: many equal exponents cost
    little, and so does a high genus with few marked points.
    """
    return _number(tuple(sorted(d))) if genus(d) is not None else Fraction(0)


@functools.cache
def _number(d: tuple[int, ...]) -> Fraction:
    """The same for ascending exponents of the right dimension."""
    if d == (0, 0, 0):
        return Fraction(1)
    if d == (1,):
        return Fraction(1, 24)
    if d[0] == 0:
        return string_equation(d[1:])
    if d[0] == 1:
        return dilaton_equation(d[1:])
    return virasoro(d[0], d[1:])


def string_equation(rest: Sequence[int]) -> Fraction:
    """<tau_0 rest> by lowering one of the others."""
    return sum(
        (
            count * intersection_number(_replace(rest, e, e - 1))
            for e, count in Counter(rest).items()
            if e
        ),
        Fraction(0),
    )


def dilaton_equation(rest: Sequence[int]) -> Fraction:
    """<tau_1 rest> = (2g - 2 + n) <rest>."""
    g = genus(rest)
    return Fraction(0) if g is None else (2 * g - 2 + len(rest)) * intersection_number(rest)


def virasoro(e: int, rest: Sequence[int]) -> Fraction:
    """<tau_e rest>, e >= 1, by the recursion of Dijkgraaf, Verlinde and Verlinde."""
    counts = Counter(rest)
    total = Fraction(0)
    for f, count in counts.items():
        ratio = odd_factorial(2 * (e + f) - 1) // odd_factorial(2 * f - 1)
        total += count * ratio * intersection_number(_replace(rest, f, e + f - 1))
    for a in range(e - 1):
        b = e - 2 - a
        both = intersection_number((a, b, *rest))
        for inside, outside, ways in _splits(counts):
            left, right = (a, *inside), (b, *outside)
            if genus(left) is not None and genus(right) is not None:
                both += ways * intersection_number(left) * intersection_number(right)
        total += both * odd_factorial(2 * a + 1) * odd_factorial(2 * b + 1) / 2
    return total / odd_factorial(2 * e + 1)


def _replace(d: Sequence[int], old: int, new: int) -> tuple[int, ...]:
    i = list(d).index(old)
    return (*d[:i], new, *d[i + 1 :])


def _splits(counts: Counter) -> Iterator[tuple[list[int], list[int], int]]:
    """Every way to cut a multiset in two, and how many ways that is of its points."""
    for taken in product(*(range(count + 1) for count in counts.values())):
        inside = [e for e, k in zip(counts, taken, strict=True) for _ in range(k)]
        outside = [e for (e, n), k in zip(counts.items(), taken, strict=True) for _ in range(n - k)]
        ways = math.prod(math.comb(n, k) for n, k in zip(counts.values(), taken, strict=True))
        yield inside, outside, ways


def exponents(g: int, n: int, smallest: int = 0) -> Iterator[tuple[int, ...]]:
    """All descending exponents of the right dimension in genus `g` with `n` points."""

    def parts(total: int, n: int, largest: int) -> Iterator[tuple[int, ...]]:
        if n == 0:
            if total == 0:
                yield ()
            return
        for first in range(min(largest, total), smallest - 1, -1):
            for others in parts(total - first, n - 1, first):
                yield (first, *others)

    if 2 * g - 2 + n > 0:
        yield from parts(3 * g - 3 + n, n, 3 * g - 3 + n)


def logarithm(value: Fraction) -> float:
    """The natural logarithm of a positive rational, also where it fits no float."""
    return math.log(value.numerator) - math.log(value.denominator)


def large_genus_ratio(d: Sequence[int]) -> float:
    """The number over its asymptotic value in large genus (Aggarwal, arXiv 2004.05042).

    prod (2 d_i + 1)!! <tau_d>_g -> 2^n / (4 pi) Gamma(2g - 2 + n) (3/2)^(2g - 2 + n), uniformly
    while n grows slower than the square root of g.
    """
    g, n = genus(d), len(d)
    if g is None:
        raise ValueError(f"No moduli space has the dimension of exponents {tuple(d)}; change them.")
    euler = 2 * g - 2 + n
    exact = logarithm(intersection_number(d)) + sum(math.log(odd_factorial(2 * e + 1)) for e in d)
    limit = n * math.log(2) - math.log(4 * math.pi) + math.lgamma(euler) + euler * math.log(1.5)
    return math.exp(exact - limit)


# ------------------------------------------------------------------ quantum Airy structure


def airy_b(size: int) -> Float64[np.ndarray, "rows 4"]:
    """Entries (k, a, b, value) of B other than 0, indices below `size`, in their order.

    B[k, a, b] = (2b + 1)!! / ((2k + 1)!! (2a - 1)!!) where k + a = b + 1.
    """
    rows = [
        (k, a, b, odd_factorial(2 * b + 1) / (odd_factorial(2 * k + 1) * odd_factorial(2 * a - 1)))
        for k, a in product(range(size), repeat=2)
        if 0 <= (b := k + a - 1) < size
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


def airy_c(size: int) -> Float64[np.ndarray, "rows 4"]:
    """Entries (k, a, b, value) of C other than 0, indices below `size`, in their order.

    C[k, a, b] = (2a + 1)!! (2b + 1)!! / (2k + 1)!! where k = a + b + 2.
    """
    rows = [
        (k, a, b, odd_factorial(2 * a + 1) * odd_factorial(2 * b + 1) / odd_factorial(2 * k + 1))
        for k, a in product(range(size), repeat=2)
        if 0 <= (b := k - a - 2) < size
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


# ------------------------------------------------------------------------------- data set


@dataclass(frozen=True)
class IntersectionNumbers:
    """Every intersection number of some genera, as DynamicFormer takes it.

    An example has `exponents [points]`, descending, then zeros; `sizes`, the genus and the number
    of points; `airy [rows, 4]`: k, a, b and log(1 + 100 B[k, a, b]) of B's entries other than 0,
    then zeros; the logarithm `target`; and `group`, the number of points.

    Attributes:
      genera: 1 or more each.
      points: there are 1 to so many marked points.
      rows: of `airy`; at least `airy_rows` of every genus and number of points.
      euler: bound of 2g - 2 + n, so that a low genus may have more points (the authors': 35); None:
        none.

    Raises:
      ValueError: if a genus has no number with one marked point, no number is left, or B has more
        rows.
    """

    genera: tuple[int, ...]
    points: int
    rows: int
    euler: int | None = None

    def __post_init__(self) -> None:
        if not self.genera or min(self.genera) < 1:
            raise ValueError(f"genera={self.genera} need to be positive, and at least one.")
        if not self._sizes:
            raise ValueError(
                f"euler={self.euler} leaves no number of genera={self.genera}; raise it."
            )
        g, n = max(self._sizes, key=lambda size: 3 * size[0] + size[1])
        if (needed := airy_rows(g, n)) > self.rows:
            raise ValueError(
                f"rows={self.rows} do not hold the {needed} entries of B in genus "
                f"{g} with {n} points; give as many rows."
            )

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """Every genus with every number of points."""
        sizes = product(self.genera, range(1, self.points + 1))
        return [(g, n) for g, n in sizes if self.euler is None or 2 * g - 2 + n <= self.euler]

    @functools.cached_property
    def _exponents(self) -> list[tuple[int, ...]]:
        return [d for g, n in self._sizes for d in exponents(g, n)]

    def __len__(self) -> int:
        return len(self._exponents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        d = self._exponents[index]
        g, n = genus(d), len(d)
        return {
            "exponents": np.pad(np.array(d, np.int32), (0, self.points - n)),
            "sizes": np.array([g, n], np.float32),
            "airy": _airy_input(3 * g - 3 + n, self.rows),
            "target": np.float32(logarithm(intersection_number(d))),
            "group": np.int32(n),
        }


def airy_rows(g: int, n: int) -> int:
    """How many entries of B are not 0."""
    return len(airy_b(3 * g - 3 + n))


@functools.cache
def _airy_input(size: int, rows: int) -> np.ndarray:
    entries = airy_b(size)
    entries[:, 3] = np.log1p(100 * entries[:, 3])
    return np.pad(entries, ((0, rows - len(entries)), (0, 0))).astype(np.float32)
