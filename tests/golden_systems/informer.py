"""Informer, from the arguments of Informer2020."""

from collections.abc import Callable
from typing import Any

import golden
import jax

import zoo
from zoo.layers.mlp import gelu

ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster, with the sampled keys of the case."""
    config = case.config
    config.expect(attn=("prob", "full"), embed=("timeF", "fixed", "learned"), freq=("h", "t"))
    config.expect(activation=tuple(ACTIVATIONS))
    config.ignore("dropout", "output_attention", "n_prob_calls", "index_sample", "min_topk_gap")
    fields = config.rename(
        context_length="seq_len", label_length="label_len", horizon="out_len", factor="factor",
        embed_dim="d_model", num_heads="n_heads", depth="e_layers", decoder_depth="d_layers",
        mlp_dim="d_ff", distil="distil", mix="mix", variates="c_out",
    )  # fmt: skip
    config.expect(enc_in=fields["variates"], dec_in=fields["variates"])
    embed = config.entries["embed"]
    model = zoo.info("informer_test").create(
        **fields,
        sparse=config.entries["attn"] == "prob",
        time_embedding="features" if embed == "timeF" else embed,
        time_features=5 if config.entries["freq"] == "t" else 4,
        activation=ACTIVATIONS[config.entries["activation"]],
    )
    time_features = [case.input("x_mark_enc"), case.input("x_mark_dec")]
    if embed != "timeF":
        time_features = [m.astype("int32") for m in time_features]
    samples = [case.input(f"index_sample.{i}") for i in range(config.entries["n_prob_calls"])]
    inputs = (case.input("x_enc"), time_features[0], case.input("x_dec"), time_features[1])

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x, s: model.apply(v, *x, samples=s, method="transform"))
        return {"pred": run(variables, inputs, samples)["forecast"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("zhouhaoyi/Informer2020@")
