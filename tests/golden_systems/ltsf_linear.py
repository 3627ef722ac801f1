"""Linear, NLinear and DLinear, from the arguments of LTSF-Linear."""

from collections.abc import Callable
from typing import Any

import golden

import zoo

NAMES = {
    "Linear": "ltsf_linear_336_96",
    "NLinear": "nlinear_336_96",
    "DLinear": "dlinear_336_96",
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model that `model` names."""
    config = case.config
    config.expect(model=tuple(NAMES))
    fields = config.rename(
        context_length="seq_len", horizon="pred_len", variates="enc_in", individual="individual"
    )
    model = zoo.create(NAMES[config.entries["model"]], **fields)
    run = golden.features(model, case.input("x"))
    return model, lambda variables: {"pred": run(variables)["forecast"]}


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("cure-lab/LTSF-Linear@")
