"""Autoformer, from the arguments of its official scripts."""

from collections.abc import Callable
from typing import Any

import golden
import jax
from golden_systems import _series

import zoo


def fields(case: golden.Case) -> dict[str, Any]:
    """Our fields from what the official code and Time-Series-Library share."""
    case.config.ignore("distil")  # of the other models of the repository
    return {
        "factor": 1,
        "moving_average": 25,
        **_series.dated_fields(case),
        **_series.take(case.config, "moving_average"),
    }


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster, with the aggregation of training or of inference."""
    mode = case.config.take("mode", "inference")
    model = zoo.info("autoformer_test").create(**fields(case), dropout=0.0)
    run = forecast(case, model, mode)
    return model, lambda variables: {"pred": run(variables)}


def forecast(case: golden.Case, model: Any, mode: str = "") -> Callable[[dict], jax.Array]:
    """What encoder and decoder make of the inputs of the case."""
    case.unread("x_dec")  # the code makes its own, of the season and trend of x_enc
    inputs, train = (case.input("x_enc"), *_series.dates(case, model)), mode.startswith("train")
    run = jax.jit(lambda v, x: model.apply(v, *x, train=train, method="transform"))
    return lambda variables: run(variables, inputs)["forecast"]


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("thuml/Autoformer@")
