"""ViT and DeiT, from timm's arguments or from Hugging Face's."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import golden

import zoo

# Architectures that timm has names for and the zoo publishes no weights of.
TIMM_FURTHER = {
    **{
        f"deit3_{size}_patch{patch}_{side}": dict(
            image_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
            position="patches", layer_scale=1e-6,
        )
        for size, patch, side, width, depth, heads in (
            ("small", 16, 224, 384, 12, 6), ("small", 16, 384, 384, 12, 6),
            ("medium", 16, 224, 512, 12, 8), ("base", 16, 224, 768, 12, 12),
            ("base", 16, 384, 768, 12, 12), ("large", 16, 224, 1024, 24, 16),
            ("large", 16, 384, 1024, 24, 16), ("huge", 14, 224, 1280, 32, 16),
        )
    },
    **{
        f"vit_{size}_patch14_{reg}dinov2": dict(
            image_size=518, patch_size=14, embed_dim=width, depth=depth, num_heads=heads,
            layer_scale=1e-5, **(dict(num_registers=4, position="patches") if reg else {}),
        )
        for size, width, depth, heads in (
            ("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16),
        )
        for reg in ("", "reg4_")
    },
    **{
        f"vit_{size}_patch16_gap_{side}": dict(
            image_size=side, embed_dim=width, depth=12, num_heads=heads, class_token=False,
            pool="avg", head_norm="tokens", **more,
        )
        for size, side, width, heads, more in (
            ("medium", 240, 512, 8, dict(qkv_bias=False, layer_scale=1e-6)),
            ("medium", 256, 512, 8, dict(qkv_bias=False, layer_scale=1e-6)),
            ("medium", 384, 512, 8, dict(qkv_bias=False, layer_scale=1e-6)),
            ("betwixt", 256, 640, 10, dict(qkv_bias=False, layer_scale=1e-6)),
            ("base", 224, 768, 16, {}),
        )
    },
    **{
        f"vit_{size}_patch16_reg{registers}_gap_{side}": dict(
            image_size=side, embed_dim=width, depth=depth, num_heads=heads, class_token=False,
            num_registers=registers, position="patches", pool="avg", **more,
        )
        for size, registers, side, width, depth, heads, more in (
            ("wee", 1, 256, 256, 14, 4, dict(layer_scale=1e-5, mlp_ratio=5.0)),
            ("little", 1, 256, 320, 14, 5, dict(layer_scale=1e-5, mlp_ratio=5.6)),
            ("medium", 1, 256, 512, 12, 8, dict(layer_scale=1e-5)),
            ("medium", 4, 256, 512, 12, 8, dict(layer_scale=1e-5)),
            ("mediumd", 4, 256, 512, 20, 8, dict(layer_scale=1e-5)),
            ("mediumd", 4, 384, 512, 20, 8, dict(layer_scale=1e-5)),
            ("betwixt", 1, 256, 640, 12, 10, dict(layer_scale=1e-5)),
            ("betwixt", 4, 256, 640, 12, 10, dict(layer_scale=1e-5)),
            ("betwixt", 4, 384, 640, 12, 10, dict(layer_scale=1e-5)),
            ("base", 4, 256, 768, 12, 12, {}),
        )
    },
    **{
        f"vit_{size}_patch{patch}_clip_{side}": dict(
            image_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
            pre_norm=True, epsilon=1e-5,
        )
        for size, patch, side, width, depth, heads in (
            ("base", 32, 224, 768, 12, 12), ("base", 32, 256, 768, 12, 12),
            ("base", 32, 384, 768, 12, 12), ("base", 16, 224, 768, 12, 12),
            ("base", 16, 384, 768, 12, 12), ("large", 14, 224, 1024, 24, 16),
            ("large", 14, 336, 1024, 24, 16), ("huge", 14, 224, 1280, 32, 16),
        )
    },
    **{
        f"vit_{size}_patch{patch}_clip_quickgelu_{side}": dict(
            image_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
            pre_norm=True, epsilon=1e-5, activation="quick_gelu",
        )
        for size, patch, side, width, depth, heads in (
            ("base", 32, 224, 768, 12, 12), ("base", 16, 224, 768, 12, 12),
            ("large", 14, 224, 1024, 24, 16), ("large", 14, 336, 1024, 24, 16),
            ("huge", 14, 224, 1280, 32, 16), ("huge", 14, 378, 1280, 32, 16),
        )
    },
    **{
        f"vit_{size}_patch16_siglip{kind}_{side}": dict(
            image_size=side, embed_dim=width, depth=depth, num_heads=heads, class_token=False,
            **pool,
        )
        for size, side, width, depth, heads in (
            ("base", 224, 768, 12, 12), ("base", 256, 768, 12, 12), ("base", 384, 768, 12, 12),
            ("base", 512, 768, 12, 12), ("large", 256, 1024, 24, 16), ("large", 384, 1024, 24, 16),
        )
        for kind, pool in (("", dict(pool="map")), ("_gap", dict(pool="avg", head_norm="tokens")))
    },
    "vit_base_patch16_224_miil": dict(qkv_bias=False),
    "vit_small_patch8_224": dict(patch_size=8, embed_dim=384, num_heads=6),
    "vit_large_patch32_224": dict(patch_size=32, embed_dim=1024, depth=24, num_heads=16),
    "vit_large_patch14_224": dict(patch_size=14, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge_patch14_224": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}  # fmt: skip


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """ViT and DeiT, from timm's arguments or from Hugging Face's."""
    fields = hugging_face_vit(case) if "hidden_size" in case.config.entries else timm_vit(case)
    model = zoo.info("vit_test").create(**fields)
    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        every = {"features": out["norm"], "last_hidden_state": out["norm"]}
        return out | every | {"pooler_output": out["pooled"]}

    return model, outputs


def timm_vit(case: golden.Case) -> dict[str, Any]:
    """Our fields from the name of a timm model and the arguments that replace its own."""
    from zoo.models.vision.vit import VisionTransformer

    config = case.config
    fields = {f.name: f.default for f in dataclasses.fields(VisionTransformer)}
    fields = {k: v for k, v in fields.items() if k not in ("parent", "name")}
    named = [k for k in ("timm_model", "model", "model_name", "name") if k in config.entries]
    for key in named:
        name = config.take(key).split(".")[0]
        further = TIMM_FURTHER.get(name)
        fields |= zoo.info(name).fields if further is None else further
    config.expect(cls=("VisionTransformer", "VisionTransformerDistilled", None))
    fields["distilled"] |= config.entries.get("cls") == "VisionTransformerDistilled"
    fields |= config.rename(
        image_size="img_size",
        in_channels="in_chans",
        embed_dim="embed_dim",
        depth="depth",
        num_heads="num_heads",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        out_bias="proj_bias",
        query_key_norm="qk_norm",
        class_token="class_token",
        num_registers="reg_tokens",
        pre_norm="pre_norm",
        pool="global_pool",
        pool_prefix="pool_include_prefix",
    )
    fields["pool"] = fields["pool"] or "none"
    fields["layer_scale"] = config.take("init_values", fields["layer_scale"]) or None
    if "patch_size" in config.entries:
        fields["patch_size"] = golden.square("patch_size", config.take("patch_size"))
    if "no_embed_class" in config.entries:
        fields["position"] = "patches" if config.take("no_embed_class") else "all"
    if config.take("pos_embed", "learn") in ("", "none"):
        fields["position"] = "none"
    if config.take("fc_norm") is not None:
        fields["head_norm"] = "pooled" if config.entries["fc_norm"] else "tokens"
    if not config.take("final_norm", True):
        fields["head_norm"] = "none"
    norm = str(config.take("norm_layer") or "LayerNorm")
    found = re.fullmatch(r"(?:partial\()?(?:nn\.)?layer_?norm(?:, *eps=([\d.e-]+)\))?", norm, re.I)
    if found is None:
        raise golden.Unsupported(f"its norm is {norm}, and the zoo's model has LayerNorm only")
    fields["epsilon"] = float(found[1]) if found[1] else fields["epsilon"]
    fields["activation"] = activation(config.take("act_layer"), fields["activation"])
    head = case.shapes.get("head.weight")
    fields["num_classes"] = config.take("num_classes", head[0] if head else 0)
    config.expect(
        embed_norm_layer=None, scale_attn_norm=False, scale_mlp_norm=False,
        block_fn=(None, "Block"), mlp_layer=(None, "Mlp"),
        attn_layer=("", "attn", "Attention", None), embed_layer=(None, "PatchEmbed"),
    )  # fmt: skip
    # The sizes of `dynamic_img_*` are those of the input, and our model checks that they agree.
    config.ignore("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
                  "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "pretrained",
                  "dynamic_img_size", "dynamic_img_pad", "in21k", "distilled")  # fmt: skip
    fields["distilled"] |= bool(config.entries.get("distilled"))
    return fields


def activation(name: str | None, default: str) -> str:
    """Ours from timm's or Hugging Face's."""
    names = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
             "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # fmt: skip
    if name is None:
        return default
    known = names.get(str(name).removeprefix("nn.").lower())
    if known is None:
        raise golden.Unsupported(f"its activation is {name}; the zoo has {', '.join(names)}")
    return known


def hugging_face_vit(case: golden.Case) -> dict[str, Any]:
    """Our fields from the configuration of a ViTModel, a DeiTModel or one with a head."""
    config = case.config
    fields = config.rename(
        image_size="image_size",
        patch_size="patch_size",
        in_channels="num_channels",
        embed_dim="hidden_size",
        depth="num_hidden_layers",
        num_heads="num_attention_heads",
        qkv_bias="qkv_bias",
    )
    base = dict(image_size=224, patch_size=16, in_channels=3, depth=12, num_heads=12)
    hidden = config.take("intermediate_size", 3072)
    heads = ("classifier.weight", "cls_classifier.weight")
    head = next((case.shapes[n] for n in heads if n in case.shapes), None)
    config.expect(pooler_act="tanh")
    config.ignore("model_type", "architectures", "num_labels", "id2label", "label2id",
                  "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range",
                  "encoder_stride", "transformers_version", "_name_or_path",
                  "pooler_output_size", "torch_dtype", "dtype", "problem_type",
                  "add_pooling_layer", "cls")  # fmt: skip
    return base | fields | {
        "mlp_ratio": hidden / fields["embed_dim"],
        "epsilon": config.take("layer_norm_eps", 1e-12),
        "activation": activation(config.take("hidden_act"), "gelu"),
        "distilled": any("distillation_token" in name for name in case.shapes),
        "pre_logits": case.shapes.get("pooler.dense.bias", (0,))[0],
        "num_classes": head[0] if head else 0,
    }  # fmt: skip


def made_by(case: golden.Case) -> bool:
    name = str(case.header["config"].get("timm_model") or "")
    by_timm = case.source.startswith("timm ") and name.startswith(("vit_", "deit"))
    return by_timm or re.search(r"transformers \S+ (ViT|DeiT)", case.source) is not None
