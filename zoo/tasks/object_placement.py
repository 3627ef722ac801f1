"""Object placement: where in a picture, and how large, an object belongs (TopNet).

Zhu et al., arXiv 2304.03372. A network gives a heat map over scales and places, lower is better;
of each picture one box is known. The loss is `sparse_contrastive_loss` of `topnet.py`; boxes are
minima of the heat map away from each other (`best_boxes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.models.imaging.topnet import best_boxes, sparse_contrastive_loss
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, Networks, OneNetwork, Variables


@dataclass(frozen=True)
class ObjectPlacement(OneNetwork):
    """The sparse contrastive loss of a heat map, and whether its best boxes are the known one.

    Batches have the model's `background` and `object_image`, and `box [batch, 3]`: the scale, row
    and column of the heat map's cell where the object stood.

    Attributes:
      boxes: how many `predict` gives.
      tolerance: a box is right at the known scale if it is at most so many cells away.
      margin: of the loss, as are the next three: see `sparse_contrastive_loss`.
      limit: beyond which absolute values cost.
      weight: of that cost.
      radius: cells around a box that are left alone, in the loss and between boxes.
    """

    boxes: int = 5
    tolerance: int = 1
    margin: float = 1.0
    limit: float = 2.0
    weight: float = 0.1
    radius: int = 2
    metric: ClassVar[str] = "top1"
    checks_outputs: ClassVar[bool] = True

    def check(
        self, networks: Networks, batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Refuse boxes that lie outside the heat map.

        Raises:
          ValueError: one sentence that names what does not fit.
        """
        super().check(networks, batch, outputs)
        if "heat_map" not in outputs:  # its shape is not known yet
            return
        box, shape = np.asarray(batch["box"]), tuple(outputs["heat_map"].shape[1:])
        if box.ndim != 2 or box.shape[1] != 3 or (box < 0).any() or (box >= shape).any():
            raise ValueError(
                f"box has the shape {box.shape} and numbers up to {box.max(initial=0)}; each must "
                f"be the scale, row and column of a cell of the heat map, which has {shape}."
            )

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """The loss; when reported, how often the best box, or one of the best, is right."""
        heat_map, valid = output.astype(jnp.float32), batch.get("valid")
        each = sparse_contrastive_loss(
            heat_map, batch["box"], margin=self.margin, limit=self.limit, weight=self.weight,
            radius=self.radius,
        )  # fmt: skip
        metrics = {"loss": Mean.of(each, valid)}
        if not train:
            right = self.right(best_boxes(heat_map, self.boxes, radius=self.radius), batch["box"])
            metrics["top1"] = Mean.of(right[:, 0], valid)
            metrics[f"top{self.boxes}"] = Mean.of(right.any(1), valid)
        return metrics

    def right(
        self, boxes: Int[Array, "batch count 3"], known: Int[Array, "batch 3"]
    ) -> Bool[Array, "batch count"]:
        """Which boxes have the known scale and stand near the known place."""
        apart = jnp.abs(boxes - known[:, None])
        return (apart <= jnp.array([0, self.tolerance, self.tolerance])).all(-1)

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Array | Float[Array, "batch scales rows columns"]]:
        """The best boxes, best first, and the heat map."""
        heat_map = self.run(networks, variables, batch)[0].astype(jnp.float32)
        return {
            "boxes": best_boxes(heat_map, self.boxes, radius=self.radius),
            "heat_map": heat_map,
        }
