"""Official HAT by its constructor."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

from zoo.models.imaging.hat import HAT


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Images in, the image out; the constructor's defaults where an entry is missing."""
    config = case.config
    fields = config.rename(
        in_channels="in_chans",
        upscale="upscale",
        embed_dim="embed_dim",
        depths="depths",
        num_heads="num_heads",
        window_size="window_size",
        compress_ratio="compress_ratio",
        squeeze_factor="squeeze_factor",
        conv_scale="conv_scale",
        overlap_ratio="overlap_ratio",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        scale="qk_scale",
        range="img_range",
        absolute_position="ape",
        patch_norm="patch_norm",
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    fields["image_size"] = golden.pair(config.take("img_size", 64))
    fields["residual_conv"] = config.take("resi_connection", "1conv") == "1conv"
    config.expect(
        cls=("HAT", None), resi_connection=("1conv", "identity"), upsampler="pixelshuffle",
        patch_size=(1, [1, 1]), norm_layer=(None, "LayerNorm", "nn.LayerNorm"),
    )  # fmt: skip
    config.expect(**{"class": ("HAT", None), "type": ("HAT", None)})
    config.ignore("drop_rate", "attn_drop_rate", "drop_path_rate", "use_checkpoint")
    model = HAT(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        named = {name: np.moveaxis(np.asarray(x), -1, 1) for name, x in run(variables).items()}
        return named | {name: named["image"] for name in ("y", "out", "output")}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return "XPixelGroup/HAT" in case.source
