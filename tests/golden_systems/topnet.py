"""TopNet's loss, its gradient and its boxes, from NumPy."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.imaging.topnet import best_boxes, sparse_contrastive_loss


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A heat map made from its name and the known boxes, in float64."""
    config = case.config
    amplitude, offset = config.take("amplitude", 1.0), config.take("offset", 0.5)
    fields = config.rename(margin="margin", limit="range", weight="lam", radius="radius")
    apart = config.take("topk_radius", 2)
    config.ignore("shape")
    box = case.input("gt").astype(int)
    heat_map = amplitude * case.uniform("heatmap").astype(np.float64) + offset
    wanted = case.header["outputs"]
    tops = {name: n for name in wanted if name[:3] == "top" and (n := name[3:]).isdigit()}

    def outputs(_: dict) -> golden.Outputs:
        with jax.enable_x64(True):
            x = jnp.asarray(heat_map)

            def loss(x: jax.Array) -> jax.Array:
                return sparse_contrastive_loss(x, box, **fields)

            each = loss(x)
            named = {"loss_per_image": each, "loss": each.mean()}
            named["dmeanloss_dheatmap"] = jax.grad(lambda x: loss(x).mean())(x)
            for name, count in tops.items():
                named[name] = best_boxes(x, int(count), radius=apart)
            return {name: np.asarray(value) for name, value in named.items()}

    return None, outputs


def made_by(case: golden.Case) -> bool:
    """Whether it has TopNet's loss."""
    return "dmeanloss_dheatmap" in case.header["outputs"]
