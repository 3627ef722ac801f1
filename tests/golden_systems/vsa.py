"""Official ViTAEv2 with VSA by its constructor, and its attention alone."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

from zoo.models.vision.vsa import VariedSizeWindowAttention, ViTAEv2VSA

CLASSES = ("VSAWindowAttention", "ViTAE_VSA_basic")


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier, or one attention with what it regresses."""
    cls = case.config.take("cls")
    return _attention(case) if cls == "VSAWindowAttention" else _classifier(case)


def _attention(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    fields = config.rename(
        in_channels="dim", channels="out_dim", num_heads="num_heads", window_size="window_size",
        qkv_bias="qkv_bias", scale="qk_scale",
    )  # fmt: skip
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    fields["channels"] = fields.get("channels") or fields["in_channels"]
    model, x = VariedSizeWindowAttention(**fields), case.images()
    config.expect(img_size=(list(x.shape[1:3]), None))
    config.ignore("attn_drop", "proj_drop")

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x: model.apply(v, x, mutable="intermediates"))
        out, sown = run(variables, x)
        named = {"out": np.moveaxis(out, -1, 1)}
        for name in ("offsets", "scales"):  # the reference has [batch, heads * 2, rows, columns]
            (value,) = sown["intermediates"][f"regressed_{name}"]
            flat = value.reshape(*value.shape[:3], -1)
            named[f"sampling_{name}"] = np.moveaxis(flat, -1, 1)
        return named

    return model, outputs


def _classifier(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    stages = config.take("stages", 4)
    fields = config.rename(
        image_size="img_size",
        in_channels="in_chans",
        num_classes="num_classes",
        embed_dims="embed_dims",
        token_dims="token_dims",
        ratios="downsample_ratios",
        sizes="kernel_size",
        dilations="dilations",
        depths="NC_depth",
        num_heads="NC_heads",
        reduction_heads="RC_heads",
        groups="NC_group",
        reduction_groups="RC_group",
        wide_local="wide_pcm",
        window_size="window_size",
        mlp_ratio="mlp_ratio",
    )
    defaults = {"reduction_heads": 1, "groups": [1, 32, 64, 64], "reduction_groups": 1,
                "depths": [2, 2, 6, 2], "num_heads": 4, "embed_dims": 64}  # fmt: skip
    for name, value in (defaults | fields).items():
        if isinstance(value, int) and name in defaults:
            value = [value] * stages
        if name == "token_dims" and isinstance(value, int):
            value = [value * 2**i for i in range(stages)]
        if name == "dilations":
            value = [tuple(rates) for rates in value]
        fields[name] = tuple(value) if isinstance(value, list) else value
    if "image_size" in fields:
        fields["image_size"] = golden.pair(fields["image_size"])
    vsa = (["VSA"] * stages, "VSA")
    config.expect(RC_op="cat", norm_eps=1e-6, RC_tokens_type=vsa, NC_tokens_type=vsa)
    # The official cells take the last four for other kinds of attention only.
    config.ignore("drop_rate", "attn_drop_rate", "drop_path_rate", "relative_pos", "qkv_bias",
                  "qk_scale", "num_deform")  # fmt: skip
    fields["has_pos_conv"] = config.take("cpe", False)
    model = ViTAEv2VSA(**fields)
    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        return {name.replace("reduce", "rc"): x for name, x in run(variables).items()}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    return case.header["config"].get("cls") in CLASSES
