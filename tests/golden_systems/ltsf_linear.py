"""Linear, NLinear and DLinear, from the arguments of LTSF-Linear."""

from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _series

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
    # Of the other models of the repository; the average of DLinear has 25 steps whatever is set.
    config.ignore(*_series.UNUSED, "label_len", "moving_avg", "kernel_size", "dec_in", "c_out")
    config.ignore("embed", "embed_type", "factor", "distil", "activation")
    config.ignore("d_model", "n_heads", "e_layers", "d_layers", "d_ff")
    fields = config.rename(
        context_length="seq_len", horizon="pred_len", variates="enc_in", individual="individual"
    )
    model = zoo.create(NAMES[config.entries["model"]], **fields)
    run = golden.features(model, case.input("x"))
    return model, lambda variables: {"pred": run(variables)["forecast"]}


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("cure-lab/LTSF-Linear@")
