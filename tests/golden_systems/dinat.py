"""Official NAT, DiNAT, DiNAT_s and isotropic NAT."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo
from zoo.models.vision.dinat import DiNAT

# what the official constructors take if nothing is said
_DEFAULTS = {
    "NAT": {},
    "DiNAT": {},
    "DiNAT_s": {
        "overlapping": False,
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 4.0,
    },
    "NATIsotropic": {
        "overlapping": False,
        "patch_size": 16,
        "embed_dim": 384,
        "depths": (12,),
        "num_heads": (12,),
        "mlp_ratio": 4.0,
    },
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A model by official name or by constructor; `stage_i` includes the merging that follows."""
    config = case.config
    name, cls = config.take("model"), config.take("cls")
    isotropic = cls == "NATIsotropic"
    fields = config.rename(
        in_channels="in_chans",
        num_classes="num_classes",
        embed_dim="embed_dim",
        depths="depths",
        num_heads="num_heads",
        kernel_size="kernel_size",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        scale="qk_scale",
        layer_scale="layer_scale",
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    for key in ("mlp_ratio", "layer_scale"):
        if fields.get(key) is not None:
            fields[key] = float(fields[key])
    if cls in ("DiNAT_s", "NATIsotropic"):
        fields |= config.rename(patch_size="patch_size", patch_norm="patch_norm")
        fields.pop("layer_scale", None)  # which these classes swallow
    if isotropic:
        depth, heads = config.take("depth", 12), fields.pop("num_heads", 12)
        dilation = config.take("dilation", 2) or 1
        fields |= {"depths": (depth,), "num_heads": (heads,)}
        fields["dilations"] = (tuple(dilation if b % 2 else 1 for b in range(depth)),)
        config.ignore("img_size")  # of the map that the images give
        layer = config.take("layer", "NATransformerLayer")
        if layer not in ("NATransformerLayer", "VisionTransformerLayer"):
            raise golden.Unsupported(f"its layer is {layer}, which its code does not have")
        if layer == "VisionTransformerLayer":
            fields["kernel_size"] = None
        fields["image_size"] = case.images().shape[1:3]
    else:
        given = config.take("dilations")
        if given is not None:
            fields["dilations"] = tuple(tuple(d or 1 for d in stage) for stage in given)
    config.expect(norm_layer=(None, "LayerNorm", "nn.LayerNorm", "torch.nn.LayerNorm"))
    config.ignore("drop_rate", "attn_drop_rate", "drop_path_rate", "pretrained")
    model = zoo.create(name, **fields) if name else DiNAT(**{**_DEFAULTS[cls], **_tuples(fields)})
    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        for i in range(1, len(model.depths)):
            wanted = np.prod(case.header["outputs"].get(f"stage{i}", {}).get("shape", 0), dtype=int)
            if wanted == out[f"downsample{i}"].size:  # else before merging
                out[f"stage{i}"] = out[f"downsample{i}"]
        return out

    return model, outputs


def _tuples(fields: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def made_by(case: golden.Case) -> bool:
    config = case.header["config"]
    named = str(config.get("model") or "")
    return config.get("cls") in _DEFAULTS or named.startswith(("nat_", "dinat_", "vitrpb_"))
