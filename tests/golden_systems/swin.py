"""Official, timm's and torchvision's Swin."""

import dataclasses
from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Official, timm's and torchvision's Swin: stage outputs include the merging that follows."""
    config = case.config
    name = next((config.take(k) for k in ("timm_model", "torchvision_model", "model") if
                 k in config.entries), None)  # fmt: skip
    fields = config.rename(
        image_size="img_size",
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
        absolute_position="ape",
        patch_norm="patch_norm",
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    for key in ("patch_size", "window_size"):
        fields |= {key: golden.square(key, fields[key])} if key in fields else {}
    config.expect(
        cls=("SwinTransformer", None), global_pool=("avg", None), always_partition=False,
        norm_layer=(None, "LayerNorm", "nn.LayerNorm", "torch.nn.LayerNorm", "layernorm"),
    )  # fmt: skip
    config.ignore("drop_rate", "attn_drop_rate", "drop_path_rate", "proj_drop_rate",
                  "use_checkpoint", "fused_window_process", "strict_img_size",
                  "pretrained")  # fmt: skip
    if name:
        torchvision = {f"swin_{size[0]}": size for size in ("tiny", "small", "base")}
        name = f"swin_{torchvision[name]}_patch4_window7_224" if name in torchvision else name
        model = zoo.create(name.split(".")[0].removesuffix("_in22k"), **fields)
        heads = [s for k, s in case.shapes.items() if k in ("head.weight", "head.fc.weight")]
        model = model.clone(num_classes=heads[0][0] if heads else 0)
    else:
        from zoo.models.vision.swin import Swin

        base = zoo.info("swin_test")
        defaults = {f.name: f.default for f in dataclasses.fields(Swin) if f.name in base.fields}
        model = base.create(**{**defaults, **fields})

    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        for i in range(1, len(model.depths)):
            wanted = np.prod(case.header["outputs"].get(f"stage{i}", {}).get("shape", 0), dtype=int)
            if wanted == out[f"merge{i}"].size:  # else before merging, as timm cuts stages
                out[f"stage{i}"] = out[f"merge{i}"]
        return out

    return model, outputs


def made_by(case: golden.Case) -> bool:
    config = case.header["config"]
    named = config.get("timm_model") or config.get("torchvision_model") or ""
    return config.get("cls") == "SwinTransformer" or str(named).startswith("swin_")
