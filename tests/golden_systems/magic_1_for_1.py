"""The released Magic 1-For-1 transformer by its constructor, and its schedule of noise levels."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

from zoo.inference.diffusion import Flow
from zoo.models.video.magic_1_for_1 import Magic1For1

INPUTS = {
    "hidden_states": "latents",
    "encoder_hidden_states": "given",
    "timestep": "times",
    "text_states": "text",
    "text_mask": "text_mask",
    "text_states_2": "pooled",
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Latents `B C T H W` and conditions in, the velocity out; or noise levels by name."""
    config = case.config
    if "class" not in config.entries:
        config.ignore("formula")
        return None, _sigmas(case)
    config.expect(**{"class": "Magic141VideoDiffusionTransformer"})
    fields = config.rename(
        embed_dim="hidden_size",
        num_heads="heads_num",
        mlp_ratio="mlp_width_ratio",
        activation="mlp_act_type",
        double_depth="mm_double_blocks_depth",
        single_depth="mm_single_blocks_depth",
        rope_theta="rope_theta",
        qkv_bias="qkv_bias",
        mask_text="use_attention_mask",
        text_channels="text_states_dim",
        pooled_channels="text_states_dim_2",
        guidance_embed="guidance_embed",
    )
    norm = config.take("qk_norm_type", "rms")
    fields["qk_norm"] = norm if config.take("qk_norm", True) else None
    fields["refine_text"] = config.take("text_projection", "single_refiner") == "single_refiner"
    config.expect(text_projection=("single_refiner", "linear"))
    config.ignore("dtype", "device")
    in_channels = config.take("in_channels", 33)
    given = {ours: case.input(name) for name, ours in INPUTS.items() if name in case.names}
    batch = len(given["latents"])
    for name in ("text", "text_mask", "pooled"):  # one text may serve a whole batch
        given[name] = np.repeat(given[name], batch // len(given[name]), 0)
    for name in ("latents", "given"):
        given[name] = np.moveaxis(given[name], 1, -1)
    for name in ("text_guidance", "guidance", "face_mask"):
        if name in case.names:
            case.unread(name)  # the official network takes it and does not use it
    model = Magic1For1(
        clip_size=given["latents"].shape[1:4],
        latent_channels=(in_channels - 1) // 2,
        out_channels=config.take("out_channels") or in_channels,
        patch_size=tuple(config.take("patch_size", (1, 2, 2))),
        rope_dims=tuple(config.take("rope_dim_list", (16, 56, 56))),
        text_length=given["text"].shape[1],
        **fields,
    )

    def outputs(variables: dict) -> golden.Outputs:
        out = jax.jit(lambda v, x: model.apply(v, **x))(variables, given)
        out = np.moveaxis(np.asarray(out), -1, 1)
        return dict.fromkeys(("sample", "y", "out", "prediction"), out)

    return model, outputs


def _sigmas(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    def outputs(_: dict) -> golden.Outputs:
        named = {}
        for name in case.header["outputs"]:
            found = re.fullmatch(r"(sigmas|times|timesteps)_(\d+)_([\d.]+)", name)
            if found is None:
                raise golden.Unsupported(f"it has an output {name!r}, which is no schedule")
            sigmas = Flow(int(found[2]), shift=float(found[3])).sigmas()
            named[name] = sigmas if found[1] == "sigmas" else 1000 * sigmas[:-1]
        return named

    return outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return "Magic-1-For-1" in case.source
