"""Diffusion and flow matching: a network learns what noise has been added.

    x = alpha x0 + sigma noise;     loss = |target - network(x, time)|^2 + bound

The level is drawn anew for each example. What the target is (noise, velocity, the clean sample, a
flow's velocity) is the task's `prediction`; samples come from `zoo.inference.sample` with the same
schedule. Where a network gives twice the channels, the second half says how large the variance of a
step is; it learns from the variational bound, which leaves the mean alone (arXiv 2102.09672).

With a `mask` in the batch (1 where a sample is to be made, 0 where it is given) the network sees
the clean sample where it is given, and only what is to be made counts (VDT's mask modelling).

For classifier-free guidance (arXiv 2207.12598) some examples see zeros in place of their conditions
in training; samples then follow `u + guidance (c - u)`, u without and c with the conditions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.inference.diffusion import (
    DDIM,
    DDPM,
    Diffusion,
    Euler,
    Flow,
    Guidance,
    Level,
    Predict,
    Solver,
    add_noise,
    sample,
    target,
    variational_bound,
)
from zoo.tasks.apply import apply_model
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Task, Variables


@dataclass(frozen=True)
class Denoising(Task):
    """A network `(latents, times, conditions) -> prediction` learns to denoise.

    Batches have `latents`, clean ones, the network's conditions by name, and perhaps `mask`, which
    has all axes of the latents but the channels.

    Attributes:
      prediction: what the network says: "noise", "velocity", "clean" or "flow".
      steps: noise levels of training; the schedule is linear (a flow's levels are continuous).
      betas: of a schedule that is no flow: "linear" or "cosine".
      sampling_steps: of `predict`, by DDIM or, for a flow, Euler's method.
      shift: of a flow's schedule in sampling.
      level_mean: of a flow's levels in training: sigma is the sigmoid of a normal number of this
        mean; below zero, there is less noise.
      conditions: inputs of the network that guidance leaves out; their zeros must mean "none".
      dropped: part of the examples that see none of them in training.
      guidance: scale of classifier-free guidance in `predict`; 1 is none.
    """

    prediction: Literal["noise", "velocity", "clean", "flow"] = "noise"
    steps: int = 1000
    betas: Literal["linear", "cosine"] = "linear"
    sampling_steps: int = 50
    shift: float = 1.0
    level_mean: float = 0.0
    conditions: tuple[str, ...] = ()
    dropped: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse guidance that leaves nothing out."""
        if (self.dropped or self.guidance != 1.0) and not self.conditions:
            raise ValueError(
                f"dropped={self.dropped} and guidance={self.guidance} ask for conditions to leave "
                "out; name inputs of the network, such as conditions=('text',)."
            )

    def loss(
        self,
        networks: nn.Module,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The mean over examples, each at a level of its own."""
        rng, drop = jax.random.split(rng)
        metrics, collections = self.losses(networks, variables, batch, rng, drop)
        return metrics["loss"].compute(), Aux(metrics, collections)

    def metrics(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """The losses of held-out examples at levels of a fixed key, and of predicting zeros."""
        return self.losses(networks, variables, batch, jax.random.key(0), None)[0]

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch ..."]]:
        """Samples under the batch's conditions, from noise of a fixed key."""
        shape = batch["latents"].shape
        solver: Solver = Euler() if self.prediction == "flow" else DDIM(self.prediction)
        x = sample(self.guided(networks, variables, batch), shape, solver=solver,
                   schedule=self.schedule(self.sampling_steps), rng=jax.random.key(0))  # fmt: skip
        return {"samples": self.seen(x, batch)}

    def answer(
        self, network: nn.Module, variables: Variables, batch: Batch, x: Array, times: Array,
        drop: Array | None = None,
    ) -> tuple[Array, Mapping[str, Any]]:  # fmt: skip
        """What a network says of noisy samples under the batch's conditions.

        With a key it is in training, and its changed collections come too.
        """
        inputs = {**batch, "latents": self.seen(x, batch), "times": times}
        out, collections = apply_model(network, variables, inputs, drop, drop is not None)
        return out.astype(jnp.float32), collections

    def guided(self, network: nn.Module, variables: Variables, batch: Batch) -> Predict:
        """The network under the batch's conditions, with guidance, for `sample`."""

        def predict(x: Array, times: Array) -> Array:
            return self.answer(network, variables, batch, x, times)[0]

        def unconditional(x: Array, times: Array) -> Array:
            none = self._without(batch, jnp.ones(len(x), bool))
            return self.answer(network, variables, none, x, times)[0]

        return Guidance(self.guidance, unconditional).guide(predict)

    def schedule(self, steps: int) -> Diffusion | Flow:
        """The schedule for sampling in so many steps."""
        if self.prediction == "flow":
            return Flow(steps, self.shift)
        return Diffusion(self.steps, self.betas, None if steps == self.steps else steps)

    def levels(self, rng: PRNGKeyArray, count: int) -> tuple[Level, Level | None]:
        """A level for each example, and for a discrete schedule the next cleaner one."""
        if self.prediction == "flow":  # logit-normal, as rectified flows are trained
            sigma = jax.nn.sigmoid(self.level_mean + jax.random.normal(rng, (count,)))
            zero = jnp.zeros_like(sigma)
            return Level(1000 * sigma, 1 - sigma, sigma, zero, zero), None
        schedule = self.schedule(self.steps)
        return schedule.at(jax.random.randint(rng, (count,), 0, self.steps))

    def losses(
        self, network: nn.Module, variables: Variables, batch: Batch, rng: Array, drop: Array | None
    ) -> tuple[dict[str, Mean], Mapping[str, Any]]:
        """Metrics, `loss` among them, and collections; in training if there is a key to drop by."""
        x0, valid = batch["latents"], batch.get("valid")
        level_rng, noise_rng = jax.random.split(rng)
        noise = jax.random.normal(noise_rng, x0.shape)
        level, cleaner = self.levels(level_rng, len(x0))
        x = add_noise(x0, noise, level)
        seen = batch
        if self.dropped and drop is not None:
            key = jax.random.fold_in(drop, 2)
            seen = self._without(batch, jax.random.bernoulli(key, self.dropped, (len(x0),)))
        out, collections = self.answer(network, variables, seen, x, level.time, drop)
        channels = x.shape[-1]
        wanted = target(self.prediction, x0, noise, level)
        weight = batch["mask"][..., None] if "mask" in batch else jnp.ones_like(x[..., :1])
        axes = tuple(range(1, x.ndim))
        share = jnp.maximum(weight.mean(axes), 1e-6)
        error = (((out[..., :channels] - wanted) * weight) ** 2).mean(axes)
        zero = ((wanted * weight) ** 2).mean(axes)
        metrics = {
            "error": Mean.of(error / share, valid),
            "zeros_error": Mean.of(zero / share, valid),
        }
        if out.shape[-1] == 2 * channels and cleaner is not None:
            fixed = jax.lax.stop_gradient(out[..., :channels])
            both = jnp.concatenate([fixed, out[..., channels:]], -1)
            step = DDPM(self.prediction, "learned").reverse(x, level, cleaner, both)
            bound = variational_bound(x0, x, *step[:2], level, cleaner)
            metrics["bound"] = Mean.of(bound, valid)
            error = error + bound
        metrics["loss"] = Mean.of(error, valid)
        return metrics, collections

    def seen(self, x: Array, batch: Batch) -> Array:
        """The batch's latents where its mask is 0, `x` elsewhere."""
        if "mask" not in batch:
            return x
        mask = batch["mask"][..., None]
        return batch["latents"] * (1 - mask) + x * mask

    def _without(self, batch: Batch, rows: Array) -> Batch:
        """The batch with zeros for the conditions of these rows."""
        missing = [name for name in self.conditions if name not in batch]
        if missing:
            raise ValueError(
                f"Guidance leaves out {', '.join(missing)}, but the batch has only "
                f"{', '.join(batch)}; name its conditions."
            )

        def zeroed(x: Array) -> Array:
            return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x)

        return {**batch, **{name: zeroed(batch[name]) for name in self.conditions}}
