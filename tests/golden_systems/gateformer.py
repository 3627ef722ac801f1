"""Gateformer, from the arguments of its official scripts."""

from collections.abc import Callable
from typing import Any

import golden
import jax
from golden_systems import _series

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster, and what it reads from the time of each series."""
    config = case.config
    named = ("context_length", "horizon", "patch_length", "stride", "embed_dim", "mlp_dim",
             "num_heads", "depth")  # fmt: skip
    # No time features, no decoder, and blocks of PyTorch, which are not told the activation.
    config.ignore(*_series.UNUSED, "embed", "label_len", "d_layers", "moving_avg", "factor")
    config.ignore("distil", "use_norm", "activation", "model")
    fields = _series.take(config, *named) | _series.variates(case)
    model = zoo.info("gateformer_test").create(**fields)
    case.unread("x_mark_enc", "x_dec", "x_mark_dec")

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x: model.apply(v, x, method="features"))
        found = run(variables, case.input("x_enc"))
        return {**found, "pred": found["forecast"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("nyuolab/Gateformer@")
