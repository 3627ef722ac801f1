"""diffusers' AutoencoderKL by its constructor."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

from zoo.models.imaging.autoencoder_kl import AutoencoderKL


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """An image to its moments and back from their mean, or scaled latents to an image."""
    config = case.config
    fields = config.rename(
        in_channels="in_channels",
        latent_channels="latent_channels",
        channels="block_out_channels",
        depth="layers_per_block",
        norm_groups="norm_num_groups",
        attend="mid_block_add_attention",
    )
    fields = {"channels": (64,), "depth": 1} | fields
    fields["channels"] = tuple(fields["channels"])
    fields["scale"] = config.take("scaling_factor", 0.18215)
    fields["shift"] = config.take("shift_factor") or 0.0
    fields["quant"] = config.take("use_quant_conv", True)
    stages = len(fields["channels"])
    config.expect(
        act_fn="silu",
        out_channels=fields.get("in_channels", 3),
        use_post_quant_conv=fields["quant"],
        down_block_types=(["DownEncoderBlock2D"] * stages, None),
        up_block_types=(["UpDecoderBlock2D"] * stages, None),
    )
    config.expect(latents_mean=None, latents_std=None)
    config.expect(**{"class": ("AutoencoderKL", None)})
    config.ignore("sample_size", "force_upcast")
    model = AutoencoderKL(**fields)
    given = {name: np.moveaxis(case.input(name), 1, -1) for name in case.names}

    def outputs(variables: dict) -> golden.Outputs:
        named = {}
        if "sample" in given:
            run = jax.jit(lambda v, x: model.apply(v, x, method="features"))
            named = dict(run(variables, given["sample"]))
            mean, log_variance = np.split(np.asarray(named["moments"]), 2, -1)
            named |= {"mean": mean, "logvar": np.clip(log_variance, -30, 20)}
        if "latents" in given:
            run = jax.jit(lambda v, x: model.apply(v, x, method="decode"))
            named["decoded"] = run(variables, given["latents"])
        return {name: np.moveaxis(np.asarray(x), -1, 1) for name, x in named.items()}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the reference's class."""
    return "AutoencoderKL" in case.source
