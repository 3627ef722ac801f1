"""Gateformer, from the arguments of its official scripts."""

from collections.abc import Callable
from typing import Any

import golden
import jax

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster, and what it reads from the time of each series."""
    config = case.config
    named = {"context_length": "seq_len", "horizon": "pred_len", "variates": "enc_in",
             "patch_length": "patch_len", "stride": "stride", "embed_dim": "d_model",
             "mlp_dim": "d_ff", "num_heads": "n_heads", "depth": "e_layers"}  # fmt: skip
    config.ignore("dropout", "embed", "freq")  # no time_features: `embed` and `freq` shape nothing
    model = zoo.create("gateformer_test", **config.rename(**named))

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x: model.apply(v, x, method="features"))
        found = run(variables, case.input("x_enc"))
        return {"pred": found["forecast"], "temporal": found["temporal"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("nyuolab/Gateformer@")
