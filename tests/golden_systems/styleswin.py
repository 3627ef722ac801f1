"""Official StyleSwin: the generator and the discriminator by their constructors."""

from collections.abc import Callable
from typing import Any

import fill
import golden
import jax
import numpy as np

from zoo.models.imaging.styleswin import Discriminator, Generator

TRAINING = ("drop_rate", "attn_drop_rate", "use_checkpoint")


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Noise to an image and its style, or an image to a logit."""
    config = case.config
    cls = config.take("class")
    if cls == "Generator":
        return _generator(case)
    if cls == "Discriminator":
        return _discriminator(case)
    raise golden.Unsupported(f"its class is {cls!r}; known are Generator and Discriminator")


def _generator(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    fields = config.rename(
        size="size",
        style_dim="style_dim",
        mapping_layers="n_mlp",
        channel_multiplier="channel_multiplier",
        mapping_rate="lr_mlp",
        full_resolution="enable_full_resolution",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        scale="qk_scale",
    )
    fields["scale"] = fields.get("scale") or None  # the official code takes 0 for the default too
    truncation = float(config.take("truncation") or config.take("psi") or 1.0)
    config.ignore(*TRAINING, "return_latents", "inject_index")
    model = Generator(**fields)
    noise = next(case.input(n) for n in ("noise", "z") if n in case.names)
    mean = next(
        (n for n in ("truncation_latent", "mean_latent", "mean_w") if n in case.names), None
    )
    mean = None if mean is None else case.input(mean).reshape(1, -1)
    run = jax.jit(
        lambda v, z, m: model.apply(v, z, truncation=truncation, mean_latent=m, method="features")
    )

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables, noise, mean)
        latent = np.asarray(out["latent"])
        described = case.header["outputs"].get("latent", {}).get("shape", [])
        if len(described) == 3:  # one copy a block
            latent = np.repeat(latent[:, None], described[1], 1)
        image = np.moveaxis(np.asarray(out["image"]), -1, 1)
        return {"image": image, "latent": latent, "y": image}

    return model, outputs


def _discriminator(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    fields = config.rename(size="size", channel_multiplier="channel_multiplier", spectral="sn")
    fields.setdefault("spectral", False)
    config.expect(blur_kernel=([1, 3, 3, 1], None), ssd=False)
    model = Discriminator(**fields)
    for name, _, shape, kind in list(case.header["state_dict"]):
        if name.endswith("weight_u") and kind == "kept":  # as the reference filled them
            matrix = name.replace("weight_u", "weight_orig")
            weight = fill.weight(matrix, case.shapes[matrix]).reshape(shape[0], -1)
            u = _unit(fill.uniform(name, tuple(shape)))
            case.kept[name] = u
            case.kept[name.replace("weight_u", "weight_v")] = _unit(weight.T @ u)
    images = case.images()

    def outputs(variables: dict) -> golden.Outputs:
        logits = jax.jit(model.apply)(variables, images)
        return dict.fromkeys(("logit", "logits", "y"), logits)

    return model, outputs


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.float32(max(np.linalg.norm(x), 1e-12))


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return "microsoft/StyleSwin" in case.source
