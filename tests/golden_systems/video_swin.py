"""Official Video Swin, with its head or without, and torchvision's."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

import zoo
from zoo.models.video.video_swin import VideoSwin

SIZES = {"t": "tiny", "s": "small", "b": "base"}  # of torchvision's names


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A recognizer by its constructor; `stage_i` includes the merging that follows."""
    config = case.config
    fields = torchvision(config) if is_torchvision(case) else official(config)
    fields |= config.rename(
        patch_size="patch_size",
        num_classes="num_classes",
        embed_dim="embed_dim",
        depths="depths",
        num_heads="num_heads",
        window_size="window_size",
        mlp_ratio="mlp_ratio",
    )
    heads = ("cls_head.fc_cls.weight", "head.weight")
    head = next((case.shapes[name] for name in heads if name in case.shapes), None)
    fields["num_classes"] = head[0] if head else 0
    if isinstance(fields.get("patch_size"), int):  # in the official code, a cube
        fields["patch_size"] = (fields["patch_size"],) * 3
    config.expect(norm_layer=(None, "LayerNorm", "nn.LayerNorm"))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    model = VideoSwin(**fields)
    if len(case.names) != 1:
        raise golden.Unsupported(f"one input of clips is wanted, not {', '.join(case.names)}")
    clips = np.moveaxis(case.input(case.names[0]), 1, -1)
    run = jax.jit(lambda v, x: model.apply(v, x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables, clips)
        for i in range(1, len(model.depths)):
            wanted = np.prod(case.header["outputs"].get(f"stage{i}", {}).get("shape", 0), dtype=int)
            if wanted == out[f"downsample{i}"].size:  # else before merging
                out[f"stage{i}"] = out[f"downsample{i}"]
        out = {k: np.moveaxis(v, -1, 1) if v.ndim == 5 else v for k, v in out.items()}
        return out | {"features": out["norm"]}

    return model, outputs


def official(config: golden.Config) -> dict[str, Any]:
    """What only the official constructor takes, and its defaults."""
    config.ignore("cls", "drop_rate", "attn_drop_rate", "drop_path_rate", "use_checkpoint",
                  "frozen_stages", "pretrained", "pretrained2d", "dropout_ratio",
                  "in_channels")  # fmt: skip
    config.expect(spatial_type=("avg", None))
    fields = {"patch_size": (4, 4, 4), "window_size": (2, 7, 7), "patch_norm": False}
    fields |= config.rename(
        in_channels="in_chans", qkv_bias="qkv_bias", scale="qk_scale", patch_norm="patch_norm"
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    return fields


def torchvision(config: golden.Config) -> dict[str, Any]:
    """What only torchvision's functions and their class take."""
    config.ignore("cls", "dropout", "attention_dropout", "stochastic_depth_prob", "weights",
                  "progress")  # fmt: skip
    name = config.take("torchvision_model")
    if name is None:
        return {}
    size = SIZES[name.removeprefix("swin3d_")]
    fields = zoo.info(f"swin_{size}_patch244_window877_kinetics400_1k").fields
    return {k: v for k, v in fields.items() if k != "drop_path"}


def is_torchvision(case: golden.Case) -> bool:
    entries = case.header["config"]
    return "torchvision_model" in entries or str(entries.get("cls")) == "SwinTransformer3d"


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official class or recognizer, or one of torchvision's."""
    entries = case.header["config"]
    torchvision = str(entries.get("torchvision_model")).startswith("swin3d_")
    return torchvision or "swintransformer3d" in str(entries.get("cls")).lower()
