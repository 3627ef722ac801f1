"""Faster samplers from trained ones: guidance in one call, and students of few steps.

Guidance distillation (Meng et al., arXiv 2210.03142, first stage): the student learns in one call
what classifier-free guidance makes of two calls of the teacher,

    |student(x, t, c) - (u + scale (c - u))|^2

Step distillation by matching distributions (DMD2, Yin et al., arXiv 2405.14867; Magic 1-For-1,
arXiv 2502.07701, names it without its constants). A fake network learns to denoise what the student
makes; where it and the teacher see other clean samples behind the same noisy one, the student is
pushed from the fake's towards the teacher's:

    x0 = student(x_k, t_k);  x_t = alpha x0 + sigma noise
    student    |x0 - stop(x0 - (fake(x_t) - teacher(x_t)) / mean|x0 - teacher(x_t)|)|^2 / 2
    fake       the loss of `Denoising` on x0

`x_k` comes from the student's own steps before (its samples, not noisy data); from level to level
samples are noised anew (`Renoise`). The paper's adversarial head is left out.

DMD2 draws the step k for each example. The fake then learns the outputs of all steps mixed, and the
mixture can be the teacher's where no step's outputs are: measured on a ring of Gaussians of
deviation 0.05, the mixture was 0.002 beside the corners, and the last step's outputs, which are the
samples, 0.07. So the last step is `judged` here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.inference.diffusion import Level, Renoise, add_noise, clean, sample
from zoo.tasks.diffusion import Denoising
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Networks, Phase, Task, Variables, of_network


@dataclass(frozen=True)
class GuidanceDistillation(Task):
    """Networks `student` and `teacher`, of which one is trained; batches are those of `Denoising`.

    Attributes:
      denoising: how the teacher was trained, with the guidance that the student is to learn.
    """

    denoising: Denoising = field(default_factory=Denoising)
    phases: ClassVar[tuple[Phase, ...]] = (Phase("train", ("student",)),)
    metric: ClassVar[str] = "error"

    def loss(
        self,
        networks: Networks,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The student's squared distance from the guided teacher, each example at its own level."""
        rng, drop = jax.random.split(rng)
        metrics, changed = self._errors(networks, variables, batch, rng, drop)
        return metrics["loss"].compute(), Aux(metrics, _put(variables, "student", changed))

    def metrics(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """The same at levels of a fixed key, and of the teacher without guidance."""
        return self._errors(networks, variables, batch, jax.random.key(0), None)[0]

    def predict(
        self, networks: Networks, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch ..."]]:
        """Samples of the student, one call a step."""
        plain = replace(self.denoising, guidance=1.0)
        return plain.predict(networks["student"], of_network(variables, "student"), batch)

    def _errors(
        self, networks: Networks, variables: Variables, batch: Batch, rng: Array, drop: Array | None
    ) -> tuple[dict[str, Mean], Mapping[str, Any]]:
        x0, valid, task = batch["latents"], batch.get("valid"), self.denoising
        x, level = _noisy(task, x0, rng)
        own = of_network(variables, "student")
        said, changed = task.answer(networks["student"], own, batch, x, level.time, drop)
        theirs = of_network(variables, "teacher")
        wanted = task.guided(networks["teacher"], theirs, batch)(x, level.time)
        wanted = jax.lax.stop_gradient(wanted)
        metrics = {"loss": Mean.of(_squared(said - wanted, batch), valid)}
        metrics["error"] = metrics["loss"]
        if drop is None:
            plain = task.answer(networks["teacher"], theirs, batch, x, level.time)[0]
            metrics["unguided_error"] = Mean.of(_squared(plain - wanted, batch), valid)
        return metrics, changed


@dataclass(frozen=True)
class StepDistillation(Task):
    """Networks `student`, `teacher` and `fake`, alike, all of which begin as the trained teacher.

    Batches are those of `Denoising`; of their latents only the shape counts, and what a mask gives.

    Attributes:
      denoising: how the teacher was trained, with its guidance and `sampling_steps`.
      steps: of the student.
      judged: whose outputs learn: the "last" step's, which are the samples, or "every" one's, drawn
        for each example as DMD2 does.
    """

    denoising: Denoising = field(default_factory=Denoising)
    steps: int = 4
    judged: Literal["last", "every"] = "last"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("fake", ("fake",), repeats=5),
        Phase("student", ("student",)),
    )
    metric: ClassVar[str] = "score_distance"

    def loss(
        self,
        networks: Networks,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """Of the fake: denoising; of the student: the way from the fake to the teacher."""
        make_rng, rng, drop = jax.random.split(rng, 3)
        x0, changed = self._make(networks, variables, batch, make_rng, drop)
        if phase == "fake":
            made = {**batch, "latents": jax.lax.stop_gradient(x0)}
            task, own = replace(self.denoising, dropped=0.0), of_network(variables, "fake")
            metrics, changed = task.losses(networks["fake"], own, made, rng, drop)
            return metrics["loss"].compute(), Aux(metrics, _put(variables, "fake", changed))
        direction, apart = self._direction(networks, variables, batch, x0, rng)
        each = _squared(x0 - jax.lax.stop_gradient(x0 - direction), batch) / 2
        valid = batch.get("valid")
        metrics = {"loss": Mean.of(each, valid), "score_distance": Mean.of(apart, valid)}
        return metrics["loss"].compute(), Aux(metrics, _put(variables, "student", changed))

    def metrics(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """How far the fake's clean samples are from the teacher's, behind the student's, noised."""
        make_rng, rng = jax.random.split(jax.random.key(0))
        x0, _ = self._make(networks, variables, batch, make_rng, None)
        _, apart = self._direction(networks, variables, batch, x0, rng)
        return {"score_distance": Mean.of(apart, batch.get("valid"))}

    def predict(
        self, networks: Networks, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch ..."]]:
        """Samples of the student in its few steps, and of the teacher in all of its own."""
        plain = replace(self.denoising, guidance=1.0)
        x = sample(
            plain.guided(networks["student"], of_network(variables, "student"), batch),
            batch["latents"].shape,
            schedule=plain.schedule(self.steps),
            solver=Renoise(plain.prediction),
            rng=jax.random.key(0),
        )
        theirs = of_network(variables, "teacher")
        teacher = self.denoising.predict(networks["teacher"], theirs, batch)["samples"]
        return {"samples": plain.seen(x, batch), "teacher_samples": teacher}

    def _make(
        self, networks: Networks, variables: Variables, batch: Batch, rng: Array, drop: Array | None
    ) -> tuple[Array, Mapping[str, Any]]:
        """What the student makes at the step that is judged; the steps before are given."""
        task, network = self.denoising, networks["student"]
        own, shape = of_network(variables, "student"), batch["latents"].shape
        levels = jax.tree.map(jnp.asarray, task.schedule(self.steps).levels())
        first, draw, rest = jax.random.split(rng, 3)
        solver = Renoise(task.prediction)
        fixed = jax.lax.stop_gradient(own)

        def step(x: Array, at: tuple) -> tuple[Array, Array]:
            t, t_next, key = at
            said, _ = task.answer(network, fixed, batch, x, jnp.full(shape[:1], t.time))
            return solver.step((), x, t, t_next, said, key)[1], x

        x = jax.random.normal(first, shape)
        pairs = tuple(Level(*(v[a:b] for v in levels)) for a, b in ((None, -2), (1, -1)))
        x, before = jax.lax.scan(step, x, (*pairs, jax.random.split(rest, self.steps - 1)))
        every = jnp.concatenate([before, x[None]])
        earliest = self.steps - 1 if self.judged == "last" else 0
        k = jax.random.randint(draw, shape[:1], earliest, self.steps)
        x, level = every[k, jnp.arange(shape[0])], Level(*(v[k] for v in levels))
        said, changed = task.answer(network, own, batch, x, level.time, drop)
        return task.seen(clean(task.prediction, said[..., : shape[-1]], x, level), batch), changed

    def _direction(
        self, networks: Networks, variables: Variables, batch: Batch, x0: Array, rng: Array
    ) -> tuple[Array, Float[Array, "batch"]]:
        """From the teacher's clean samples to the fake's, divided by how far the teacher's are."""
        task, x0 = self.denoising, jax.lax.stop_gradient(x0)
        made, channels, axes = {**batch, "latents": x0}, x0.shape[-1], tuple(range(1, x0.ndim))
        x, level = _noisy(task, x0, rng)
        theirs, fakes = of_network(variables, "teacher"), of_network(variables, "fake")
        said = (
            task.guided(networks["teacher"], theirs, made)(x, level.time),
            task.answer(networks["fake"], fakes, made, x, level.time)[0],
        )
        real, fake = (clean(task.prediction, y[..., :channels], x, level) for y in said)
        far = jnp.abs(x0 - real).mean(axes, keepdims=True)
        direction = jax.lax.stop_gradient((fake - real) / jnp.maximum(far, 1e-6))
        return direction, jnp.abs(fake - real).mean(axes)


def _noisy(task: Denoising, x0: Array, rng: Array) -> tuple[Array, Level]:
    level_rng, noise_rng = jax.random.split(rng)
    level, _ = task.levels(level_rng, len(x0))
    return add_noise(x0, jax.random.normal(noise_rng, x0.shape), level), level


def _squared(apart: Array, batch: Batch) -> Float[Array, "batch"]:
    """The mean square of each example, of what is to be made."""
    if "mask" in batch:
        apart = apart * batch["mask"][..., None]
    return (apart**2).mean(tuple(range(1, apart.ndim)))


def _put(variables: Variables, name: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Collections of all networks, with those of one changed."""
    return {kind: {**variables[kind], name: tree} for kind, tree in changed.items()}
