"""Official FaViT by its constructor."""

from collections.abc import Callable
from typing import Any

import golden

from zoo.models.vision.favit import FaViT


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier."""
    config = case.config
    fields = config.rename(
        in_channels="in_chans",
        num_classes="num_classes",
        embed_dims="embed_dims",
        depths="depths",
        num_heads="num_heads",
        mlp_ratios="mlp_ratios",
        qkv_bias="qkv_bias",
        sr_ratios="sr_ratios",
    )
    fields.setdefault("qkv_bias", False)  # the constructor's defaults
    fields.setdefault("depths", (2, 2, 5, 2))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if config.take("norm_eps") is not None:
        fields["epsilon"] = config.entries["norm_eps"]
    elif "norm_layer" in config.entries:  # the plain one
        fields["epsilon"] = 1e-5
    config.expect(cls="FactorizationTransformer", num_stages=4,
                  norm_layer=(None, "LayerNorm", "nn.LayerNorm"))  # fmt: skip
    # the official code uses none of the first three
    config.ignore("img_size", "patch_size", "qk_scale", "drop_rate", "attn_drop_rate",
                  "drop_path_rate")  # fmt: skip
    images = case.images()
    model = FaViT(image_size=images.shape[1:3], **fields)
    return model, golden.features(model, images)


def made_by(case: golden.Case) -> bool:
    return case.header["config"].get("cls") == "FactorizationTransformer"
