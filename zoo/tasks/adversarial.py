"""Adversarial generation: a generator and a discriminator, trained against each other.

Goodfellow et al., arXiv 1406.2661, with the non-saturating loss; hinge loss (Lim and Ye, arXiv
1705.02894); R1 (Mescheder et al., arXiv 1801.04406):

    discriminator    softplus(D(G(z))) + softplus(-D(x)) + gamma/2 |grad_x D(x)|^2
    generator        softplus(-D(G(z)))

The two updates of a step see the same batch and, unless the batch brings them, other latents. What
networks keep beside their parameters (batch statistics, the singular vectors of spectral
normalization) takes a step with every call in training, in both phases, as the hooks of the
official codes do; the slope that R1 asks for is of weights as the real examples saw them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.tasks.apply import apply_model
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Networks, Phase, Task, Variables, of_network


@dataclass(frozen=True)
class Adversarial(Task):
    """Networks `generator` and `discriminator`, one phase and one optimizer each.

    The generator takes latents (its first example input) and gives examples; the discriminator
    takes examples (its first example input, which batches have by that name) and gives one number
    for each, large for real ones. Latents are normal numbers, or those that the batch has.

    Attributes:
      kind: which losses.
      r1: gamma of the R1 penalty; 0 is none.
    """

    kind: Literal["non_saturating", "hinge"] = "non_saturating"
    r1: float = 0.0
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("discriminator", ("discriminator",)),
        Phase("generator", ("generator",)),
    )

    def loss(
        self,
        networks: Networks,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss of one of the two."""
        latent_rng, drop_rng = jax.random.split(rng)
        real, valid = self._real(networks, batch), batch.get("valid")
        fake, kept = self._generate(networks, variables, batch, latent_rng, drop_rng)
        discriminator, own = networks["discriminator"], of_network(variables, "discriminator")
        judge_rng = jax.random.fold_in(drop_rng, 1)

        def judge(examples: Array, state: Mapping[str, Any]) -> tuple[Array, Mapping[str, Any]]:
            inputs = {first_input(discriminator): examples}
            scores, state = apply_model(discriminator, {**own, **state}, inputs, judge_rng, True)
            return scores.reshape(len(examples)).astype(jnp.float32), state

        def aux(metrics: dict[str, Mean], state: Mapping[str, Any]) -> Aux:
            collections: dict[str, Any] = {}
            for name, changed in (("generator", kept), ("discriminator", state)):
                for kind, tree in changed.items():
                    collections.setdefault(kind, dict(variables[kind]))[name] = tree
            return Aux(metrics, collections)

        if phase == "generator":
            scores, state = judge(fake, {})
            each = -scores if self.kind == "hinge" else jax.nn.softplus(-scores)
            metrics = {"loss": Mean.of(each, valid)}
            return metrics["loss"].compute(), aux(metrics, state)
        on_fake, between = judge(jax.lax.stop_gradient(fake), {})
        on_real, state = judge(real, between)
        if self.kind == "hinge":
            each = jax.nn.relu(1 + on_fake) + jax.nn.relu(1 - on_real)
        else:
            each = jax.nn.softplus(on_fake) + jax.nn.softplus(-on_real)
        metrics = {}
        if self.r1:
            slope = jax.grad(lambda x: judge(x, between)[0].sum())(real).astype(jnp.float32)
            penalty = (slope**2).reshape(len(slope), -1).sum(-1)
            metrics["r1"] = Mean.of(penalty, valid)
            each = each + self.r1 / 2 * penalty
        metrics |= {
            "loss": Mean.of(each, valid),
            "real_score": Mean.of(on_real, valid),
            "fake_score": Mean.of(on_fake, valid),
        }
        return metrics["loss"].compute(), aux(metrics, state)

    def metrics(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """How often the discriminator tells held-out examples from generated ones.

        0.5 is best for the generator. Latents of a batch without any come from a fixed key.
        """
        own = of_network(variables, "discriminator")
        real, valid = self._real(networks, batch), batch.get("valid")
        fake = self.predict(networks, variables, batch)["examples"]
        on_real, on_fake = (
            networks["discriminator"].apply(own, examples).reshape(len(examples))
            for examples in (real, fake)
        )
        right = jnp.stack([on_real > 0, on_fake < 0], 1).mean(1)
        return {"discriminated": Mean.of(right, valid)}

    def predict(
        self, networks: Networks, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch ..."]]:
        """Generated examples, as many as the batch has rows."""
        key = jax.random.key(0)
        return {"examples": self._generate(networks, variables, batch, key, None)[0]}

    def _real(self, networks: Networks, batch: Batch) -> Array:
        name = first_input(networks["discriminator"])
        if name not in batch:
            raise ValueError(
                f"The discriminator takes {name!r}, but the batch has {', '.join(batch)}; use data "
                "of its kind."
            )
        return batch[name]

    def _generate(
        self, networks: Networks, variables: Variables, batch: Batch, rng: Array, drop: Any
    ) -> tuple[Array, Mapping[str, Any]]:
        """Examples and, in training, the generator's changed collections."""
        generator, own = networks["generator"], of_network(variables, "generator")
        name = first_input(generator)
        latents = batch.get(name)
        if latents is None:
            rows = len(self._real(networks, batch))
            latents = jax.random.normal(rng, (rows, *generator.example_inputs()[name].shape[1:]))
        return apply_model(generator, own, {name: latents}, drop, drop is not None)


def first_input(network: nn.Module) -> str:
    """The name of a network's first argument."""
    return next(iter(network.example_inputs()))
