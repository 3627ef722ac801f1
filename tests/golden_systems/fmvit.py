"""The algebra of reparameterized layers: no reference of the published FMViT exists."""

from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp

from zoo.models.vision.fmvit import RepConv, merge


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """One layer: its branches, and the one convolution that they are."""
    config = case.config
    model = RepConv(config.take("C"), groups=tuple(config.take("groups")))
    config.expect(bn_eps=1e-5)
    images = case.images()

    def outputs(variables: dict) -> golden.Outputs:
        one = merge(variables["params"], variables["batch_stats"])
        return {
            "y": jnp.moveaxis(model.apply(variables, images), -1, 1),
            "merged_kernel": one["kernel"].T,
            "merged_bias": one["bias"],
        }

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the source says whose layer it is not."""
    return "NOT a reference of the published FMViT layer" in case.source
