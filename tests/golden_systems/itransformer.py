"""iTransformer, from the arguments of its official scripts or of Time-Series-Library."""

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


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster and its attention maps."""
    case.config.ignore("factor")  # of other kinds of attention
    heads = _series.take(case.config, "num_heads")
    model = zoo.info("itransformer_test").create(**inverted_fields(case), **heads)
    inputs = inverted_inputs(case)

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x: model.apply(v, **x, mutable=["intermediates"]))
        forecast, state = run(variables, inputs)
        layers = (state["intermediates"][f"layers_{i}"] for i in range(model.depth))
        maps = [layer["attention"]["attention"][0] for layer in layers]
        named = {f"attn_{i}": attention for i, attention in enumerate(maps)}
        return {"pred": forecast, "attn_last": maps[-1], **named}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("thuml/iTransformer@")
