"""Official CSWin."""

from collections.abc import Callable
from typing import Any

import golden

import zoo
from zoo.models.vision.cswin import CSWin


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A model by official name or by constructor."""
    config = case.config
    name = config.take("model")
    fields = config.rename(
        image_size="img_size",
        in_channels="in_chans",
        num_classes="num_classes",
        embed_dim="embed_dim",
        depths="depth",
        stripe_widths="split_size",
        num_heads="num_heads",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        scale="qk_scale",
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    if "image_size" in fields:
        fields["image_size"] = golden.pair(fields["image_size"])
    config.expect(
        cls=("CSWinTransformer", None),
        hybrid_backbone=None,
        norm_layer=(None, "LayerNorm", "nn.LayerNorm", "torch.nn.LayerNorm"),
    )
    # the stem has stride 4 whatever patch_size says
    config.ignore("patch_size", "drop_rate", "attn_drop_rate", "drop_path_rate", "use_chk",
                  "pretrained")  # fmt: skip
    if not name:  # the constructor's defaults
        base = {"embed_dim": 96, "depths": (2, 2, 6, 2), "stripe_widths": (3, 5, 7)}
        fields = base | fields
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    widths = fields.get("stripe_widths", ())
    if len(widths) == 3:  # the official code reads the last for the last stage
        fields["stripe_widths"] = (*widths, widths[-1])
    model = zoo.create(name, **fields) if name else CSWin(**fields)
    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        return {**out, "stage1_conv_embed": out["patch_embed"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    config = case.header["config"]
    named = str(config.get("model") or "").lower()
    return config.get("cls") == "CSWinTransformer" or named.startswith("cswin_")
