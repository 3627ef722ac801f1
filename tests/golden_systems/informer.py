"""Informer and InformerStack, from the arguments of Informer2020."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
from golden_systems import _series

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster, with the sampled keys of the case."""
    config = case.config
    config.expect(attn=("prob", "full"))
    name = str(config.take("model", "")) + case.source
    stacked = any(".encoders." in tensor for tensor in case.shapes) or "Stack" in name
    depths = {key: config.take(key) for key in ("s_layers", "stacks", "e_layers")}
    config.ignore("n_prob_calls", "index_sample")
    fields = _series.dated_fields(case) | config.rename(distil="distil", mix="mix")
    if stacked:
        found = next(x for x in (*depths.values(), (3, 2, 1)) if x is not None)
        fields["stacks"] = tuple(int(n) for n in re.findall(r"\d+", str(found)))
        fields.pop("depth", None)
    model = zoo.info("informer_test").create(
        **{"factor": 5, **fields}, sparse=config.entries.get("attn", "prob") == "prob"
    )
    calls = (sum(model.depths) + model.decoder_depth) * model.sparse
    samples = [case.input(f"index_sample.{i}") for i in range(calls)]
    seen, ahead = _series.dates(case, model)
    inputs = (case.input("x_enc"), seen, case.input("x_dec"), ahead)

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x, s: model.apply(v, *x, samples=s, method="transform"))
        return {"pred": run(variables, inputs, samples)["forecast"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("zhouhaoyi/Informer2020@")
