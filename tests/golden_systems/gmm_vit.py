"""The authors' ViT, Swin and CaiT, with a mask of either kind or none."""

from collections.abc import Callable
from typing import Any

import golden

from zoo.models.vision.gmm_hosts import GmmCaiT, GmmSwin
from zoo.models.vision.gmm_pyramids import GmmPiT, GmmT2T
from zoo.models.vision.gmm_vit import GmmViT

# official class -> ours, our names of its arguments
HOSTS = {
    "ViT": (
        GmmViT,
        dict(
            in_channels="channels", embed_dim="dim", depth="depth", num_heads="heads",
            head_dim="dim_head", mlp_ratio="mlp_dim_ratio",
        ),
    ),
    "SwinTransformer": (
        GmmSwin,
        dict(
            in_channels="in_chans", embed_dim="embed_dim", depths="depths", num_heads="num_heads",
            window_size="window_size", mlp_ratio="mlp_ratio", qkv_bias="qkv_bias",
            scale="qk_scale", patch_norm="patch_norm",
        ),
    ),
    "CaiT": (
        GmmCaiT,
        dict(
            embed_dim="dim", depth="depth", class_depth="cls_depth", num_heads="heads",
            head_dim="dim_head", hidden="mlp_dim",
        ),
    ),
    "PiT": (
        GmmPiT,
        dict(
            embed_dim="dim", depths="depth", num_heads="heads", head_dim="dim_head",
            mlp_ratio="mlp_dim_ratio",
        ),
    ),
    "T2T_ViT": (
        GmmT2T,
        dict(
            in_channels="in_chans", token_dim="token_dim", embed_dim="embed_dim", depth="depth",
            num_heads="num_heads", mlp_ratio="mlp_ratio", qkv_bias="qkv_bias", scale="qk_scale",
        ),
    ),
}  # fmt: skip
# what the official constructors take if nothing is said, where it is not what `create_model` gives
DEFAULTS = {
    "ViT": {},
    "SwinTransformer": dict(
        image_size=(224, 224), patch_size=4, num_classes=1000, depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24), window_size=7, mlp_ratio=4.0,
    ),
    "CaiT": dict(kernels=3),
    "PiT": dict(head_dim=64),
    "T2T_ViT": dict(image_size=(224, 224), num_classes=1000),
}  # fmt: skip


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier; `block0` is what its first MLP gives, before it is added."""
    config = case.config
    cls = config.take("cls", "ViT")
    if cls not in HOSTS:
        raise golden.Unsupported(f"its model is {cls}; the zoo has {', '.join(HOSTS)}")
    module, names = HOSTS[cls]
    fields = DEFAULTS[cls] | config.rename(**names, num_classes="num_classes")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    fields |= config.rename(kernels="num_kernals")
    if cls == "PiT" and isinstance(fields.get("num_heads"), int):
        fields["num_heads"] = (fields["num_heads"],) * len(fields["depths"])
    if "img_size" in config.entries:
        fields["image_size"] = golden.pair(config.take("img_size"))
    if "patch_size" in config.entries:
        fields["patch_size"] = golden.square("patch_size", config.take("patch_size"))
    if "scale" in fields:
        fields["scale"] = fields["scale"] or None  # the official code takes 0 for the default too
    gaussian, elementwise = config.take("is_GMM", False), config.take("is_SLM", False)
    if elementwise and cls == "SwinTransformer" and not gaussian:
        raise golden.Unsupported("the official Swin cannot be built with is_SLM")
    config.expect(norm_layer=(None, "LayerNorm", "nn.LayerNorm"))
    config.ignore("stochastic_depth", "dropout", "emb_dropout", "layer_dropout", "drop_rate",
                  "attn_drop_rate", "drop_path_rate", "use_checkpoint")  # fmt: skip
    mask = "gaussian" if gaussian else "elementwise" if elementwise else None
    more = {} if cls == "SwinTransformer" else {"underflow": True}  # windows are too small for it
    model = module(mask=mask, **fields, **more)
    images = case.images()

    run = golden.captured(model, images, "mlp")

    def outputs(variables: dict) -> golden.Outputs:
        out, kept = run(variables)
        out["patch"] = out["embed" if cls == "T2T_ViT" else "patch_embed"]
        if cls == "SwinTransformer":
            merged = {f"layer{s}": out[f"downsample{s + 1}"] for s in range(len(model.depths) - 1)}
            return out | merged
        if cls == "PiT":
            first = kept["stages_0_layers_0"]
            return out | {"masked_scores0": first["attention"]["scores"][0]}
        if cls == "T2T_ViT":
            return out | {"masked_scores0": kept["layers_0"]["attention"]["scores"][0]}
        first = kept["layers_0"]
        return out | {
            "masked_scores0": first["mixer"]["attention"]["scores"][0],
            "block0": first["mlp"]["__call__"][0],
            "transformer": out[f"block{model.depth - 1}"],
            "patch_transformer": out[f"block{model.depth - 1}"],
        }

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the source is the authors' repository."""
    return case.source.startswith("CatworldLee/Gaussian-Mixture-Mask-Attention")
