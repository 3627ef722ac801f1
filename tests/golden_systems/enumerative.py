"""Intersection numbers of psi classes."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

from zoo.data.intersection import exponents, genus, intersection_number, logarithm


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The numbers of all exponents of the file: exactly its fractions, and their logarithms."""
    return None, lambda variables: _numbers(case)


def _numbers(case: golden.Case) -> golden.Outputs:
    rows = [tuple(int(e) for e in row if e >= 0) for row in case.inputs["d"]]
    sizes = list(zip(case.inputs["g"].tolist(), case.inputs["n"].tolist(), strict=True))
    assert [(genus(d), len(d)) for d in rows] == sizes
    assert {d for size in set(sizes) for d in exponents(*size)} == set(rows)
    values = [intersection_number(d) for d in rows]
    stored = zip(case.inputs["num"], case.inputs["den"], strict=True)
    assert [(str(v.numerator), str(v.denominator)) for v in values] == [
        (str(num), str(den)) for num, den in stored
    ]
    return {"log_value": np.array([logarithm(v) for v in values])}


def made_by(case: golden.Case) -> bool:
    """Whether the header names the recursions."""
    return case.source.startswith("exact rational Python")
