"""iTransformer, from the arguments of its official scripts or of Time-Series-Library."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
from golden_systems import _series

import zoo


def inverted_fields(case: golden.Case) -> dict[str, Any]:
    """Fields of models whose tokens are whole series, from what their repositories share."""
    config = case.config
    config.ignore(*_series.UNUSED, "embed", "label_len", "d_layers", "moving_avg", "distil")
    features = _series.time_features(case)
    return {
        **_series.take(config, "context_length", "horizon", "embed_dim", "depth", "mlp_dim"),
        **_series.variates(case),
        "activation": _series.activation(config),
        "standardise": bool(config.take("use_norm", True)),
        "time_features": 0 if features is None else features.shape[-1],
    }


def inverted_inputs(case: golden.Case) -> dict[str, Any]:
    """The series and, if the case has any, its time features."""
    case.unread("x_dec", "x_mark_dec")  # there is no decoder
    features = _series.time_features(case)
    return {"series": case.input("x_enc")} | (
        {} if features is None else {"time_features": features}
    )


ATTENTIONS = {"iFlowformer": "flow", "iInformer": "prob_sparse", "iReformer": "hashed"}
"""Models of the repository that differ in their attention; iFlashformer's is the softmax."""


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster and its attention maps."""
    named = f"{case.config.take('model', '')} {case.source}"
    case.config.ignore("n_prob_calls", "index_sample")
    case.config.ignore("rotations")
    attention = next((ours for name, ours in ATTENTIONS.items() if name in named), "softmax")
    fields = _series.take(case.config, "num_heads", "factor") | inverted_fields(case)
    if attention != "softmax" or "iFlash" in named:
        fields["standardise"] = True  # they do not look at use_norm
    model = zoo.info("itransformer_test").create(**fields, attention=attention)
    inputs = inverted_inputs(case)
    if attention == "prob_sparse":
        inputs["samples"] = [case.input(f"index_sample.{i}") for i in range(model.depth)]
    if attention == "hashed":
        prefix = next(n for n in case.names if re.fullmatch(r".*rot.*0", n))[:-1]
        inputs["samples"] = [
            case.input(f"{prefix}{i}").reshape(
                model.embed_dim // model.num_heads, -1, case.input(f"{prefix}{i}").shape[-1]
            )
            for i in range(model.depth)
        ]

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(
            lambda v, x: model.apply(v, **x, method="features", mutable=["intermediates"])
        )
        found, state = run(variables, inputs)
        named = {"pred": found["forecast"], "enc_out": found["norm"]}
        if attention == "softmax":
            layers = (state["intermediates"][f"layers_{i}"] for i in range(model.depth))
            maps = [layer["attention"]["attention"][0] for layer in layers]
            named |= {f"attn_{i}": weights for i, weights in enumerate(maps)}
            named["attn_last"] = maps[-1]
        return named

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("thuml/iTransformer@")
