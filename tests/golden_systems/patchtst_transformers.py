"""PatchTST, from the configuration and the class of transformers."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

import zoo
from zoo.checkpoints import hub_config

OUTPUTS = ("prediction_outputs", "prediction_output", "prediction_logits", "regression_outputs")


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model that a folder with this configuration is."""
    config = case.config
    entries = {name: config.take(name) for name in list(config.entries)}
    kind = hub_config.KINDS["patchtst"]
    for name, allowed in kind.only.items():
        config.expect(**{name: allowed})
    told = {"architectures": [entries.pop("class", "PatchTSTForPrediction")], **DEFAULTS, **entries}
    fields = {ours: told[theirs] for theirs, ours in kind.shown.items()} | kind.more(told)
    model = zoo.info("transformers_patchtst_512_96").create(**fields)
    x = case.input("past_values")
    hidden = None
    if fields["head"] == "patches":  # the last ones are hidden of every series
        assert told["mask_type"] == "forecast", "random masks are not in the file"
        count = (x.shape[1] - model.patch_length) // model.stride + 1
        hidden = np.arange(count) >= count - _one(told["num_forecast_mask_patches"])
        hidden = np.broadcast_to(hidden, (x.shape[0], x.shape[2], count))

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x, h: model.apply(v, x, h, method="features"))
        found = run(variables, x, hidden)
        said = found[{"forecast": "forecast", "patches": "patches"}.get(model.head, "logits")]
        states = [found["embed"], *(found[f"layer{i}"] for i in range(model.depth))]
        named = {f"hidden_state{i}": state for i, state in enumerate(states)}
        return {**found, **named, **dict.fromkeys(OUTPUTS, said)}

    return model, outputs


DEFAULTS = dict(
    num_input_channels=1, context_length=32, prediction_length=24, patch_length=1, patch_stride=1,
    num_hidden_layers=3, d_model=128, ffn_dim=512, mask_type="random",
    num_forecast_mask_patches=[2],
)  # fmt: skip
"""What the configuration class has where an entry is left out."""


def _one(value: int | list[int]) -> int:
    (number,) = value if isinstance(value, list) else [value]
    return number


def made_by(case: golden.Case) -> bool:
    """Whether the header names transformers and a PatchTST."""
    return "transformers" in case.source and "PatchTST" in case.source
