"""Official, timm's and torchvision's Swin."""

import dataclasses
from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo

S3 = {  # timm has them under Swin: Chen et al., arXiv 2111.14725
    "swin_s3_tiny_224": dict(window_size=(7, 7, 14, 7)),
    "swin_s3_small_224": dict(window_size=(14, 14, 14, 7), depths=(2, 2, 18, 2)),
    "swin_s3_base_224": dict(window_size=(7, 7, 14, 7), depths=(2, 2, 30, 2)),
}


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
    if "patch_size" in fields:
        fields["patch_size"] = golden.square("patch_size", fields["patch_size"])
    window = fields.get("window_size")
    if isinstance(window, list) and len(window) == 2:  # height and width; else one a stage
        fields["window_size"] = golden.square("window_size", window)
    config.expect(
        cls=("SwinTransformer", None), global_pool=("avg", None), always_partition=False,
        norm_layer=(None, "LayerNorm", "nn.LayerNorm", "torch.nn.LayerNorm", "layernorm"),
    )  # fmt: skip
    config.ignore("dropout", "attention_dropout", "stochastic_depth_prob", "weights", "progress")
    config.ignore("drop_rate", "attn_drop_rate", "drop_path_rate", "proj_drop_rate",
                  "use_checkpoint", "fused_window_process", "strict_img_size",
                  "pretrained")  # fmt: skip
    images = case.images()
    fields.setdefault("image_size", images.shape[1:3])
    if name and name.split(".")[0] in S3:
        fields = S3[name.split(".")[0]] | fields
        name = "swin_tiny_patch4_window7_224"
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

    run = golden.features(model, images)

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        for i in range(1, len(model.depths)):
            wanted = np.prod(case.header["outputs"].get(f"stage{i}", {}).get("shape", 0), dtype=int)
            if wanted == out[f"downsample{i}"].size:  # else before merging, as timm cuts stages
                out[f"stage{i}"] = out[f"downsample{i}"]
        return out | {"features": out["norm"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    config = case.header["config"]
    named = config.get("timm_model") or config.get("torchvision_model") or ""
    other = case.source.startswith("CatworldLee/")  # whose class has the same name
    official = config.get("cls") == "SwinTransformer" and not other
    return official or str(named).startswith("swin_")
