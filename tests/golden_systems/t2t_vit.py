"""Official T2T-ViT, by its constructor."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo
from zoo.models.vision.t2t_vit import T2TViT


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier; `t2t_attention1` is the first token layer."""
    config = case.config
    fields = {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}  # the official ones
    name = config.take("model")
    if name:
        fields |= zoo.info(name).fields
    fields |= config.rename(
        image_size="img_size",
        in_channels="in_chans",
        num_classes="num_classes",
        token_dim="token_dim",
        embed_dim="embed_dim",
        depth="depth",
        num_heads="num_heads",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        scale="qk_scale",
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    fields["image_size"] = golden.pair(fields.get("image_size", 224))
    usual = "performer" if fields.pop("performer", True) else "transformer"
    kind = config.take("tokens_type", usual)
    if kind not in ("performer", "transformer"):
        raise golden.Unsupported(f"its config has tokens_type={kind!r}, a comparison of the paper")
    config.expect(cls=("T2T_ViT", None), norm_layer=(None, "LayerNorm", "nn.LayerNorm"))
    config.ignore("drop_rate", "attn_drop_rate", "drop_path_rate")
    model = T2TViT(performer=kind == "performer", **fields)
    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        split = np.moveaxis(np.asarray(out["soft_split0"]), 1, 2)
        layers = {f"t2t_attention{i}": out[f"token_layer{i}"] for i in (1, 2)}
        return out | layers | {"soft_split0": split}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official class or one of its functions."""
    config = case.header["config"]
    official = config.get("cls") == "T2T_ViT" and not case.source.startswith("CatworldLee/")
    return official or str(config.get("model") or "").startswith("t2t_vit_")
