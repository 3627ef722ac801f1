"""Transitions between clips of motion: the frames of a gap from those around it.

    loss = |rotations| + |speeds, height| + 1 |joints| + 0.5 |their speeds|
         + 0.1 |speed of feet on the ground| + 0.5 |jumps at both ends|

as means over the unknown frames (L1 everywhere; joints by forward kinematics along the track that
the predicted speeds give). The weights are our own choice: see `zoo.models.motion`. In training a
gap is shrunk as far as one of the passes finds it, at random (`progressive_masks`).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from zoo.models.motion.story_to_motion import shrunk
from zoo.motion import skeleton
from zoo.motion.skeleton import WALKER, Skeleton
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Task, Variables


@dataclass(frozen=True)
class MotionCompletion(Task):
    """Batches hold `motion`, and `start` and `stop` of the gap of each row.

    Attributes:
      body: of the motions.
      rate: frames a second.
    """

    body: Skeleton = WALKER
    rate: float = 30.0

    def loss(
        self,
        networks: nn.Module,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss above, of one pass."""
        motion, start, stop = (batch[name] for name in ("motion", "start", "stop"))
        passes = networks.passes
        choose, drop = jax.random.split(rng)
        done = jax.random.randint(choose, start.shape, 0, passes)
        edges = [jnp.stack(shrunk(start, stop, i, passes)) for i in range(passes)]
        low, high = jnp.take_along_axis(jnp.stack(edges), done[None, None], axis=0)[0]
        low, high = (jnp.where(high > low, each, whole)
                     for each, whole in ((low, start), (high, stop)))  # fmt: skip
        frame = jnp.arange(motion.shape[1])
        unknown = (frame >= low[:, None]) & (frame < high[:, None])
        said = networks.apply(
            variables, motion, (~unknown).astype(jnp.int32), train=True, rngs={"dropout": drop}
        )
        each = self.terms(said, motion, unknown)
        metrics = {name: Mean.of(value, batch.get("valid")) for name, value in each.items()}
        return metrics["loss"].compute(), Aux(metrics)

    def terms(
        self,
        said: Float[Array, "batch frames numbers"],
        truth: Float[Array, "batch frames numbers"],
        unknown: Bool[Array, "batch frames"],
    ) -> dict[str, Float[Array, "batch"]]:
        """The loss and its parts, of each row."""
        said = said.astype(jnp.float32)
        places, wanted = self._places(said), self._places(truth)
        speeds, wanted_speeds = (jnp.diff(x, axis=1) * self.rate for x in (places, wanted))
        touching = skeleton.parts(truth)[2] > 0.5
        sliding = skeleton.foot_speeds(self.body, places, self.rate) * touching
        edge = unknown[:, 1:] != unknown[:, :-1]
        count = jnp.maximum(unknown.sum(1), 1)

        def mean(error: Array, where: Array) -> Array:
            each = jnp.abs(error).reshape(*error.shape[:2], -1).mean(-1)
            return (each * where).sum(1) / jnp.maximum(where.sum(1), 1)

        joints = 6 * len(self.body.names)
        rotations = mean((said - truth)[..., :joints], unknown)
        root = mean((said - truth)[..., joints:], unknown)
        joints = mean(places - wanted, unknown)
        velocity = mean(speeds - wanted_speeds, unknown[:, 1:])
        seams = mean(speeds - wanted_speeds, edge)
        slide = (sliding.mean(-1) * unknown).sum(1) / count
        loss = rotations + root + joints + 0.5 * velocity + 0.1 * slide + 0.5 * seams
        return {"loss": loss, "rotations": rotations, "joints": joints, "sliding": slide}

    def _places(self, rows: Array) -> Float[Array, "batch frames joints 3"]:
        return skeleton.joints(self.body, rows, skeleton.track(rows, self.rate))

    def metrics(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """Errors in metres and sliding in metres a second, beside those of interpolation."""
        filled = self.predict(networks, variables, batch)["motion"]
        truth, valid = batch["motion"].astype(jnp.float32), batch.get("valid")
        straight = jax.vmap(skeleton.interpolated)(truth, batch["start"], batch["stop"])
        frame = jnp.arange(truth.shape[1])
        unknown = (frame >= batch["start"][:, None]) & (frame < batch["stop"][:, None])
        wanted = self._places(truth)
        touching = skeleton.parts(truth)[2] > 0.5
        stands = touching & jnp.pad(touching[:, :-1], ((0, 0), (1, 0), (0, 0)))
        stands = stands & unknown[..., None]
        metrics = {"loss": Mean.of(self.terms(filled, truth, unknown)["loss"], valid)}
        for name, rows in (("", filled), ("line_", straight)):
            places = self._places(rows)
            error = jnp.linalg.norm(places - wanted, axis=-1).mean(-1)
            error = (error * unknown).sum(1) / jnp.maximum(unknown.sum(1), 1)
            speed = skeleton.foot_speeds(self.body, places, self.rate) * stands
            sliding = speed.sum((1, 2)) / jnp.maximum(stands.sum((1, 2)), 1)
            metrics[f"{name}joint_error"] = Mean.of(error, valid)
            metrics[f"{name}foot_sliding"] = Mean.of(sliding, valid)
        return metrics

    def predict(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        """The motions with their gaps filled in, in all passes."""
        edges = (batch[name].astype(jnp.int32) for name in ("start", "stop"))
        said = networks.apply(variables, batch["motion"], *edges, method="complete")
        return {"motion": said.astype(jnp.float32)}
