"""iTransformer, from the arguments of its official scripts or of Time-Series-Library."""

from collections.abc import Callable
from typing import Any

import golden
import jax

import zoo
from zoo.layers.mlp import gelu

ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu}


def fields(case: golden.Case) -> dict[str, Any]:
    """Our fields from what both repositories share."""
    config = case.config
    marks = config.entries["inputs"].get("x_mark_enc")
    named = {"context_length": "seq_len", "embed_dim": "d_model", "depth": "e_layers",
             "mlp_dim": "d_ff", "num_heads": "n_heads", "standardise": "use_norm"}  # fmt: skip
    activation = config.take("activation", "gelu")
    # `factor`, `class_strategy`, `embed` and `freq` shape nothing in the model but the marks.
    config.ignore("dropout", "output_attention", "factor", "class_strategy", "embed", "freq")
    return config.rename(**named) | {
        "activation": ACTIVATIONS.get(activation, gelu),
        "marks": marks["shape"][-1] if isinstance(marks, dict) else 0,
    }


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster and its last attention map."""
    config = case.config
    config.expect(activation=("gelu", "relu"))
    sizes = config.rename(horizon="pred_len", variates="n_variates")
    model = zoo.info("itransformer_test").create(**fields(case), **sizes)
    inputs = {"series": case.input("x_enc")}
    if model.marks:
        inputs["marks"] = case.input("x_mark_enc")

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x: model.apply(v, **x, mutable=["intermediates"]))
        forecast, state = run(variables, inputs)
        last = state["intermediates"][f"layers_{model.depth - 1}"]["attention"]["attention"][0]
        return {"pred": forecast, "attn_last": last}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("thuml/iTransformer@")
