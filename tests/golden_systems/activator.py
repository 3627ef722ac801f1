"""Official ACTIVATOR: its two variants, by the arguments of their classifier."""

from collections.abc import Callable
from typing import Any

import golden

from zoo.models.vision.activator import Activator

VARIANTS = {"activator.py": True, "activator_only_GEGLU.py": False}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier; `unit0` is what its first gated unit gives, `model` the stack."""
    config = case.config
    fields = config.rename(
        image_size="image_size",
        patch_size="patch_size",
        in_channels="in_channels",
        num_classes="num_classes",
        embed_dim="d_model",
        hidden="d_ffn",
        depth="num_layers",
    )
    fields["image_size"] = golden.pair(fields.get("image_size", 32))
    config.expect(cls="ACTIVATORImageClassification", variant=tuple(VARIANTS))
    config.ignore("dropout")
    model = Activator(has_mlp=VARIANTS[config.take("variant", "activator.py")], **fields)
    images = case.images()

    run = golden.captured(model, images, "gated_mlp")

    def outputs(variables: dict) -> golden.Outputs:
        out, kept = run(variables)
        unit = kept["layers_0"]["gated_mlp"]["__call__"][0]
        return out | {"unit0": unit, "model": out[f"block{model.depth - 1}"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official class."""
    return case.header["config"].get("cls") == "ACTIVATORImageClassification"
