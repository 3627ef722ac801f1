"""The tasks of Time-Series-Library: models with a head for each, and scores of anomalies."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems import _series
from golden_systems.autoformer import fields as official_autoformer_fields
from golden_systems.autoformer import forecast
from golden_systems.itransformer import inverted_fields as itransformer_fields

import zoo
from zoo.evaluators.anomalies import point_adjust, scores, threshold

RECONSTRUCTS = ("imputation", "anomaly_detection")
FORECASTS = ("long_term_forecast", "short_term_forecast", "zero_shot_forecast")


def patchtst_fields(case: golden.Case) -> dict[str, Any]:
    """What differs from `patchtst_test`, but for the head."""
    config = case.config
    # Time features, standardising and the decoder's input are not in this model.
    config.ignore(*_series.UNUSED, "use_norm", "factor", "embed", "freq", "moving_avg", "distil")
    named = ("context_length", "embed_dim", "depth", "num_heads", "mlp_dim", "patch_length")
    found = _series.take(config, *named, "stride")
    config.ignore("padding")
    found |= {"activation": _series.activation(config), **_series.variates(case)}
    return {"patch_length": 16, "stride": 8, **found}


def autoformer_fields(case: golden.Case) -> dict[str, Any]:
    """Time features in imputation and forecasts only; a decoder in forecasts only."""
    task = case.config.entries["task_name"]
    case.config.ignore("use_norm")
    fields = official_autoformer_fields(case) | {"even_delays": True}
    if task not in FORECASTS:
        fields |= {"decoder_depth": 0}
    if task in (*FORECASTS, "imputation"):
        return fields
    case.dead = ("enc_embedding.temporal_embedding.embed.weight",)  # held, and never read
    return fields | {"time_features": 0}


def inverted_fields(case: golden.Case) -> dict[str, Any]:
    """One token a series; standardised whatever `use_norm` says."""
    case.config.ignore("factor")
    fields = itransformer_fields(case) | _series.take(case.config, "num_heads")
    if case.config.entries["task_name"] not in (*FORECASTS, "imputation"):
        fields["time_features"] = 0
    return fields | {"standardise": True}


def linear_fields(case: golden.Case) -> dict[str, Any]:
    """DLinear: everything else is of the other models."""
    config = case.config
    config.ignore(*_series.UNUSED, "use_norm", "factor", "embed", "freq", "activation", "d_model")
    config.ignore("d_ff", "n_heads", "e_layers", "distil")
    named = _series.take(config, "context_length", "moving_average")
    return {"moving_average": 25, **named, **_series.variates(case)} | {
        "individual": bool(config.take("individual", False))
    }


FIELDS = {
    "PatchTST": patchtst_fields,
    "iTransformer": inverted_fields,
    "Autoformer": autoformer_fields,
    "DLinear": linear_fields,
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A model under one of the tasks, or the protocol of anomaly detection."""
    if "anomaly_ratio" in case.config.entries and "model" not in case.config.entries:
        return scoring(case)
    named = case.config.take("model") or case.source
    found = [name for name in FIELDS if name.lower() in str(named).lower()]
    if len(found) != 1:
        raise golden.Unsupported(f"its model is {named!r}; known are {', '.join(FIELDS)}")
    return head(case, found[0])


def head(case: golden.Case, name: str) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model and its output."""
    config = case.config
    task = config.take("task_name")
    # Of models with a decoder, and of the metrics.
    config.ignore("label_len", "d_layers", "dec_in", "c_out", "anomaly_ratio", "mask_rate")
    config.ignore("seasonal_patterns", "top_k", "num_kernels")
    if name != "DLinear":
        config.ignore("individual")
    fields = FIELDS[name](case)
    horizon, classes = config.take("pred_len"), config.take("num_class")
    if task == "classification":
        fields["num_classes"] = classes
    else:
        fields["horizon"] = fields["context_length"] if task in RECONSTRUCTS else horizon
    inputs = {"series": case.input("x_enc")}
    if task == "imputation":
        mask = case.input("mask") == 1
        inputs["series"] = np.where(mask, inputs["series"], 0)
        if name == "PatchTST":
            fields["masked"], inputs["mask"] = True, mask
    if task == "classification" and name == "Autoformer":
        mask = _series.time_features(case)
        mask = np.ones(inputs["series"].shape[:2]) if mask is None else mask
        fields["masked"], inputs["mask"] = True, mask == 1
    model = zoo.info(f"{name.lower()}_test").create(**fields)
    if name == "Autoformer" and task in FORECASTS:
        run = forecast(case, model)
        return model, lambda variables: {"out": run(variables)}
    # No other task reads these, and a mask or time features only where it was taken above.
    case.unread("x_dec", "x_mark_dec", "x_mark_enc", "mask")
    if getattr(model, "time_features", 0):
        features = case.input("x_mark_enc")
        dated = name == "Autoformer" and model.time_embedding != "features"
        inputs["time_features"] = features.astype("int32") if dated else features
    return model, lambda variables: {"out": jax.jit(model.apply)(variables, **inputs)}


def scoring(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The protocol of anomaly detection."""
    ratio = case.config.take("anomaly_ratio")

    def detect(_: dict) -> golden.Outputs:
        train, test = case.input("train_energy"), case.input("test_energy")
        labels = case.input("labels").astype(bool)
        limit = threshold(train, test, ratio)
        raw = test > limit
        adjusted = point_adjust(raw, labels)
        return {
            "threshold": limit,
            "pred_raw": raw,
            "pred_adjusted": adjusted,
            "metrics": np.array(list(scores(adjusted, labels).values())),
            "metrics_raw": np.array(list(scores(raw, labels).values())[1:]),
        }

    return None, detect


def made_by(case: golden.Case) -> bool:
    """Whether the header names Time-Series-Library."""
    return case.source.startswith("thuml/Time-Series-Library@")
