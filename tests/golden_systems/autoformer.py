"""Autoformer, from the arguments of its official scripts."""

from collections.abc import Callable
from typing import Any

import golden
import jax

import zoo


def fields(case: golden.Case) -> dict[str, Any]:
    """Our fields from what the official code and Time-Series-Library share."""
    config = case.config
    config.expect(embed="timeF", freq=("h", "t"), activation="gelu")
    config.ignore("dropout", "output_attention")
    return config.rename(
        context_length="seq_len", label_length="label_len", horizon="pred_len", factor="factor",
        moving_average="moving_avg", embed_dim="d_model", num_heads="n_heads", depth="e_layers",
        decoder_depth="d_layers", mlp_dim="d_ff", variates="enc_in",
    ) | {"time_features": 5 if config.entries["freq"] == "t" else 4}  # fmt: skip


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster, with the aggregation of training or of inference."""
    config = case.config
    mode = config.take("mode")
    config.ignore("min_topk_gap")
    sizes = fields(case)
    config.expect(dec_in=sizes["variates"], c_out=sizes["variates"])
    model = zoo.info("autoformer_test").create(**sizes, dropout=0.0)
    inputs = (case.input("x_enc"), case.input("x_mark_enc"), case.input("x_mark_dec"))
    case.unread("x_dec")  # the official code takes its shape only
    train = mode.startswith("training")

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x: model.apply(v, *x, train=train, method="transform"))
        return {"pred": run(variables, inputs)["forecast"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("thuml/Autoformer@")
