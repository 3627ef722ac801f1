"""The released PT-DiT (`PTDiTDiffuser`) by its constructor."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

from zoo.models.imaging.pt_dit import PTDiT

INPUTS = {
    "hidden_states": "latents",
    "timestep": "times",
    "encoder_hidden_states": "text",
    "encoder_attention_mask": "text_mask",
    "resolution": "resolution",
    "aspect_ratio": "aspect_ratio",
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Latents `B C F H W`, a time and text features in; the prediction out."""
    config = case.config
    fields = config.rename(
        num_heads="num_heads",
        head_dim="head_dim",
        depth="num_layers",
        in_channels="in_channels",
        patch_size="patch_size",
        sample_size="sample_size",
        norm_affine="norm_elementwise_affine",
        epsilon="norm_eps",
    )
    defaults = {"num_heads": 16, "head_dim": 88, "depth": 1, "norm_affine": True, "epsilon": 1e-5}
    fields = defaults | fields
    width = fields["num_heads"] * fields["head_dim"]
    config.expect(norm_type="ada_norm_single", cross_attention_dim=width)
    config.expect(**{"class": ("PTDiTDiffuser", None)})
    config.ignore(
        "dropout", "num_embeds_ada_norm", "norm_num_groups", "upcast_attention", "attention_type",
        "final_dropout",
    )  # fmt: skip
    given = {ours: case.input(name) for name, ours in INPUTS.items() if name in case.names}
    frames = config.take("frame") or given["latents"].shape[2]
    side = fields["sample_size"]
    model = PTDiT(
        clip_size=(frames, side, side),
        out_channels=config.take("out_channels") or fields["in_channels"],
        text_channels=config.take("caption_channels"),
        window=tuple(config.take("compress_ratios") or (1, 8, 8)),
        proxy_window=tuple(config.take("proxy_compress_ratios") or (1, 4, 4)),
        shift_window=bool(config.take("shift_window", False)),
        activation=config.take("activation_fn", "geglu"),
        qkv_bias=bool(config.take("attention_bias", False)),
        **fields,
    )
    given["latents"] = np.moveaxis(given["latents"], 1, -1)
    batch = len(given["latents"])
    given["text"] = given["text"].reshape(batch, -1, given["text"].shape[-1])
    model = model.clone(text_length=given["text"].shape[1])

    def outputs(variables: dict) -> golden.Outputs:
        out = jax.jit(lambda v, x: model.apply(v, **x))(variables, given)
        out = np.moveaxis(np.asarray(out), -1, 1)
        return dict.fromkeys(("y", "out", "output", "prediction"), out)

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the released file."""
    return "pt_dit_diffusers" in case.source
