"""Official SVT by its constructor, and the wavelet transform by itself."""

from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp
import numpy as np

from zoo.models.vision.svt import SVT, dtcwt, filters, inverse_dtcwt


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier, with `scatter0` its first layer in wavelet space; or the transform."""
    if case.source.startswith("pytorch_wavelets DTCWTForward"):
        for name, taps in filters().items():
            if name in case.names and not np.allclose(case.input(name), taps, rtol=0, atol=1e-7):
                raise golden.Unsupported(f"its filter {name} is not that of near_sym_b")
        return None, lambda variables: _transform(case.input("x"))
    config = case.config
    fields = config.rename(
        in_channels="in_chans",
        num_classes="num_classes",
        stem_dim="stem_hidden_dim",
        embed_dims="embed_dims",
        depths="depths",
        num_heads="num_heads",
        mlp_ratios="mlp_ratios",
        token_label="token_label",
    )
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if config.take("norm_eps") is not None:
        fields["epsilon"] = config.entries["norm_eps"]
    elif "norm_layer" in config.entries:  # the plain one
        fields["epsilon"] = 1e-5
    config.expect(cls="SVT", num_stages=4, norm_layer=(None, "LayerNorm", "nn.LayerNorm"))
    config.ignore("sr_ratios", "drop_path_rate")  # the official code does not use the first either
    images = case.images()
    model = SVT(image_size=images.shape[1:3], **fields)

    run = golden.captured(model, images, "scatter")

    def outputs(variables: dict) -> golden.Outputs:
        out, kept = run(variables)
        scatter = kept["stages_0"]["layers_0"]["scatter"]["__call__"][0]
        return out | {
            "stem": out["patch_embed"],
            "scatter0": scatter,
            "post": out["class_block"],
        }

    return model, outputs


def _transform(x: np.ndarray) -> golden.Outputs:
    """The library's layout: channels first, real and imaginary part last."""
    low, high = dtcwt(jnp.moveaxis(x, 1, -1))
    first = lambda x: jnp.moveaxis(x, -1, 1)  # noqa: E731
    return {
        "yl": first(low),
        "yh": high.transpose(0, 5, 1, 3, 4, 2),
        "highpass_only": first(inverse_dtcwt(jnp.zeros_like(low), high)),
        "reconstruction": first(inverse_dtcwt(low, high)),
    }


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official class, or the transform's."""
    transform = case.source.startswith("pytorch_wavelets DTCWTForward")
    return transform or case.header["config"].get("cls") == "SVT"
