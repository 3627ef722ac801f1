"""Official Video Swin with its head, and torchvision's."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

from zoo.models.video.video_swin import VideoSwin


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A recognizer by its constructor; `stage_i` includes the merging that follows."""
    config = case.config
    fields = config.rename(
        patch_size="patch_size",
        in_channels="in_chans",
        num_classes="num_classes",
        embed_dim="embed_dim",
        depths="depths",
        num_heads="num_heads",
        window_size="window_size",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        scale="qk_scale",
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    if isinstance(fields.get("patch_size"), int):  # in the official code, a cube
        fields["patch_size"] = (fields["patch_size"],) * 3
    config.expect(
        patch_norm=True, norm_layer=(None, "LayerNorm", "nn.LayerNorm"), pretrained2d=True
    )
    config.ignore("cls", "drop_rate", "attn_drop_rate", "drop_path_rate", "use_checkpoint",
                  "frozen_stages", "pretrained", "pretrained2d")  # fmt: skip
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    model = VideoSwin(**fields)
    (name,) = {**config.entries.get("inputs", {}), **case.inputs}
    clips = np.moveaxis(case.input(name), 1, -1)
    run = jax.jit(lambda v, x: model.apply(v, x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables, clips)
        for i in range(1, len(model.depths)):
            wanted = np.prod(case.header["outputs"].get(f"stage{i}", {}).get("shape", 0), dtype=int)
            if wanted == out[f"merge{i}"].size:  # else before merging
                out[f"stage{i}"] = out[f"merge{i}"]
        return {k: np.moveaxis(v, -1, 1) if v.ndim == 5 else v for k, v in out.items()}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names Swin3D or the official recognizer."""
    return "SwinTransformer3D" in str(case.header["config"].get("cls"))
