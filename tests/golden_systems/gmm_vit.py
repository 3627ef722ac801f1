"""The authors' ViT with a Gaussian-mixture or an elementwise mask, by its constructor."""

from collections.abc import Callable
from typing import Any

import golden
import jax

from zoo.models.vision.gmm_vit import GmmViT


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier; `block0` is what its first MLP gives, before it is added."""
    config = case.config
    fields = config.rename(
        in_channels="channels",
        num_classes="num_classes",
        embed_dim="dim",
        depth="depth",
        num_heads="heads",
        head_dim="dim_head",
        mlp_ratio="mlp_dim_ratio",
        kernels="num_kernals",
    )
    fields["image_size"] = golden.pair(config.take("img_size"))
    fields["patch_size"] = golden.square("patch_size", config.take("patch_size"))
    gaussian, elementwise = config.take("is_GMM", False), config.take("is_SLM", False)
    if not gaussian and not elementwise:
        raise golden.Unsupported("it has no mask: the zoo's ViT with a class token is vit.py")
    config.expect(cls="ViT")
    config.ignore("stochastic_depth", "dropout", "emb_dropout")
    model = GmmViT(mask="gaussian" if gaussian else "elementwise", underflow=True, **fields)
    images = case.images()

    @jax.jit
    def outputs(variables: dict) -> golden.Outputs:
        out, kept = model.apply(
            variables,
            images,
            method="features",
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "mlp",
        )
        first = kept["intermediates"]["layers_0"]
        return out | {
            "patch": out["patch_embed"],
            "masked_scores0": first["mixer"]["attention"]["scores"][0],
            "block0": first["mlp"]["__call__"][0],
            "transformer": out[f"block{model.depth - 1}"],
        }

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the source is the authors' repository."""
    return case.source.startswith("CatworldLee/Gaussian-Mixture-Mask-Attention")
