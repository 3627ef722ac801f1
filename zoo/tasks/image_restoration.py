"""Image restoration: super-resolution, denoising; PSNR and SSIM as the field counts them.

Both figures are of the luma of BT.601 in 0 ... 255, 16 to 235 for RGB in [0, 1], without a border
of `crop` pixels; images are rounded to whole numbers first, as files of them would be (BasicSR).
Grey images are their own luma.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


def luma(images: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width"]:
    """Y of BT.601, from images in [0, 1] that are rounded to 255 steps; grey ones times 255."""
    images = jnp.round(jnp.clip(images.astype(jnp.float32), 0, 1) * 255)
    if images.shape[-1] == 1:
        return images[..., 0]
    return images @ np.float32([65.481, 128.553, 24.966]) / 255 + 16


def psnr(
    images: Float[Array, "batch height width channels"],
    target: Float[Array, "batch height width channels"],
    crop: int = 0,
) -> Float[Array, "batch"]:
    """Peak signal-to-noise ratio of the luma, in decibels; at most 100."""
    ours, wanted = (_inside(luma(x), crop) for x in (images, target))
    error = ((ours - wanted) ** 2).mean((1, 2))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, 255.0**2 * 1e-10))


def ssim(
    images: Float[Array, "batch height width channels"],
    target: Float[Array, "batch height width channels"],
    crop: int = 0,
) -> Float[Array, "batch"]:
    """Structural similarity of the luma (Wang et al., 2004): a Gaussian of 11 pixels, sigma 1.5.

    Raises:
      ValueError: if the images, without their borders, are smaller than 11 pixels.
    """
    ours, wanted = (_inside(luma(x), crop) for x in (images, target))
    if min(ours.shape[1:]) < 11:
        raise ValueError(f"SSIM needs 11x11 pixels; without a border of {crop}, there are "
                         f"{ours.shape[1]}x{ours.shape[2]}.")  # fmt: skip
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    line = (line / line.sum()).astype(np.float32)

    def blur(x: Array) -> Array:
        x = sum(w * x[:, i : x.shape[1] - 10 + i] for i, w in enumerate(line))
        return sum(w * x[:, :, i : x.shape[2] - 10 + i] for i, w in enumerate(line))

    mean1, mean2 = blur(ours), blur(wanted)
    var1, var2 = blur(ours**2) - mean1**2, blur(wanted**2) - mean2**2
    both = blur(ours * wanted) - mean1 * mean2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean1 * mean2 + c1) * (2 * both + c2)
    return (likeness / ((mean1**2 + mean2**2 + c1) * (var1 + var2 + c2))).mean((1, 2))


def _inside(x: Array, crop: int) -> Array:
    return x[:, crop : x.shape[1] - crop, crop : x.shape[2] - crop]


@dataclass(frozen=True)
class ImageRestoration(OneNetwork):
    """Images to the images they were made from.

    Batches have the model's `images` and `target`, both in [0, 1].

    Attributes:
      error: of a pixel: "absolute" (L1, the usual one) or "squared".
      crop: border that PSNR and SSIM leave out, in pixels of the target; usually the scale.
    """

    error: Literal["absolute", "squared"] = "absolute"
    crop: int = 0
    metric: ClassVar[str] = "psnr"

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """The error; when reported, PSNR and SSIM too, and the PSNR of bicubic enlargement."""
        target, valid = batch["target"], batch.get("valid")
        if output.shape != target.shape:
            raise ValueError(
                f"{type(network).__name__} gives images of shape {output.shape} for targets of "
                f"{target.shape}; its upscale must be that of the data."
            )
        error = output.astype(jnp.float32) - target
        error = jnp.abs(error) if self.error == "absolute" else error**2
        metrics = {"loss": Mean.of(error.mean((1, 2, 3)), valid)}
        if not train:
            plain = jax.image.resize(batch["images"], target.shape, "bicubic")
            metrics |= {
                "psnr": Mean.of(psnr(output, target, self.crop), valid),
                "ssim": Mean.of(ssim(output, target, self.crop), valid),
                "bicubic_psnr": Mean.of(psnr(plain, target, self.crop), valid),
            }
        return metrics

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch height width channels"]]:
        """The restored images, in [0, 1]."""
        output, _ = self.run(networks, variables, batch)
        return {"image": jnp.clip(output.astype(jnp.float32), 0, 1)}
