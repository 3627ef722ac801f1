"""Video prediction: the frames that follow, beside repeating the last one that is known."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


@dataclass(frozen=True)
class VideoPrediction(OneNetwork):
    """The mean squared error of all pixels of the frames that follow.

    Batches have the model's `frames` and `target`, `[batch, time, height, width, channels]`.
    """

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """The error; when reported, also summed over a frame's pixels, and the last frame's own."""
        target, valid = batch["target"], batch.get("valid")
        if output.shape != target.shape:
            raise ValueError(
                f"{type(network).__name__} gives frames of shape {output.shape}, and the data has "
                f"{target.shape}; their number and size must be those of the model."
            )
        error = (output.astype(jnp.float32) - target) ** 2
        each = error.mean((1, 2, 3, 4))
        metrics = {"loss": Mean.of(each, valid)}
        if not train:
            repeated = ((batch["frames"][:, -1:] - target) ** 2).mean((1, 2, 3, 4))
            metrics |= {
                "frame_mse": Mean.of(error.sum((2, 3, 4)).mean(1), valid),
                "last_frame_loss": Mean.of(repeated, valid),
            }
        return metrics

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch time height width channels"]]:
        """The frames that follow."""
        output, _ = self.run(networks, variables, batch)
        return {"frames": output.astype(jnp.float32)}
