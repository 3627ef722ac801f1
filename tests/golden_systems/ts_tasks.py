"""The tasks of Time-Series-Library: models with a head for each, and scores of anomalies."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems.autoformer import fields as official_autoformer_fields
from golden_systems.itransformer import inverted_fields as itransformer_fields

import zoo
from zoo.tasks.anomaly_detection import point_adjust, scores, threshold

RECONSTRUCTS = ("imputation", "anomaly_detection")


def patchtst_fields(case: golden.Case) -> dict[str, Any]:
    """What differs from `patchtst_test`, but for the head."""
    config = case.config
    # Time features, standardising and the decoder's input are not in this model.
    config.ignore("use_norm", "factor", "embed", "freq", "output_attention", "dropout")
    config.expect(activation="gelu")
    return config.rename(
        context_length="seq_len", embed_dim="d_model", depth="e_layers", num_heads="n_heads",
        mlp_dim="d_ff", patch_length="patch_len", stride="stride",
    )  # fmt: skip


def autoformer_fields(case: golden.Case) -> dict[str, Any]:
    """The encoder alone, with time features in imputation only."""
    case.config.ignore("min_topk_gap")
    imputes = case.config.entries["task_name"] == "imputation"
    fields = official_autoformer_fields(case) | {"decoder_depth": 0}
    return fields if imputes else fields | {"time_features": 0}


def inverted_fields(case: golden.Case) -> dict[str, Any]:
    """One token a series."""
    case.config.ignore("factor")
    heads = case.config.rename(num_heads="n_heads")
    return itransformer_fields(case) | heads


FIELDS = {
    "PatchTST": patchtst_fields,
    "iTransformer": inverted_fields,
    "Autoformer": autoformer_fields,
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A model under one of the tasks, or the protocol of anomaly detection."""
    name = case.config.take("model")
    return scoring(case) if name is None else head(case, name)


def head(case: golden.Case, name: str) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model and its output."""
    config = case.config
    task = config.take("task_name")
    config.ignore("label_len", "d_layers", "dec_in", "c_out")  # of models with a decoder
    fields = FIELDS[name](case) | config.rename(variates="enc_in")
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
        else:
            inputs["time_features"] = case.input("x_mark_enc")
    if task == "classification" and name == "Autoformer":
        fields["masked"], inputs["mask"] = True, case.input("x_mark_enc") == 1
    model = zoo.info(f"{name.lower()}_test").create(**fields)
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
