"""Learning functions from the examples in a prompt; one learner, or several on the same prompts.

Batches have `xs [batch, points, dims]`, `ys [batch, points]` and, where they are wanted, `targets`
(the labels without noise) and `weights`, 1 where a point counts. A learner's output is a number a
point; a number a loop and point (`[batch, loops, points]`), whose losses are averaged; or mean and
log deviation, on a last axis of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.tasks.apply import apply_model
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Networks, Phase, Task, Variables, of_network


@dataclass(frozen=True)
class InContext(Task):
    """The loss at every point, each predicted from those before it.

    Several networks are trained by one loss, the sum of theirs, which share no parameter: each
    learns what it would alone. Their metrics have their names in front.

    Attributes:
      kind: "squared" error; "logistic" loss of labels -1 and 1, which outputs are logits of;
        "gaussian" log likelihood, of mean and log deviation.
      against: the labels that count: the `ys` of the prompt, or its `targets`.
      skip: points at the beginning that do not count.
      networks: names of the networks, where there are several.
    """

    kind: Literal["squared", "logistic", "gaussian"] = "squared"
    against: Literal["ys", "targets"] = "ys"
    skip: int = 0
    networks: tuple[str, ...] = ()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One, of all networks."""
        return (Phase("train", self.networks or ("train",)),)

    def loss(
        self,
        networks: Networks,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The mean over points that count, summed over the networks."""
        metrics, collections = {}, {}
        for name, network, own in self._each(networks, variables):
            output, changed = apply_model(network, own, batch, rng, True)
            metrics[name] = self._measure(output, batch)
            collections |= changed if isinstance(networks, nn.Module) else {}
        losses = [each["loss"] for each in metrics.values()]
        total = Mean(sum(mean.total for mean in losses), losses[0].count)
        return total.compute(), Aux({**_flat(metrics), "loss": total}, collections)

    def metrics(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """The loss, and the squared error or the accuracy, of the points that count."""
        each = {
            name: self._measure(apply_model(network, own, batch, None, False)[0], batch)
            for name, network, own in self._each(networks, variables)
        }
        return _flat(each)

    def predict(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Array]:
        """What each network says of every point, by its name: of the last loop, if it has loops.

        The one network's name is `prediction`.
        """
        return {
            name or "prediction": self._last(apply_model(network, own, batch, None, False)[0])
            for name, network, own in self._each(networks, variables)
        }

    def _each(self, networks: Networks, variables: Variables) -> list[tuple[str, nn.Module, Any]]:
        if isinstance(networks, nn.Module):
            return [("", networks, variables)]
        return [(name, net, of_network(variables, name)) for name, net in networks.items()]

    def _last(self, output: Array) -> Array:
        return output[:, -1] if output.ndim == 3 and self.kind != "gaussian" else output

    def _measure(self, output: Array, batch: Batch) -> dict[str, Mean]:
        output, labels = output.astype(jnp.float32), batch[self.against].astype(jnp.float32)
        weights = batch.get("weights", jnp.ones_like(labels))
        weights = weights * (jnp.arange(labels.shape[1]) >= self.skip)
        if "valid" in batch:
            weights = weights * batch["valid"][:, None]
        by_loop = output if output.ndim == 3 and self.kind != "gaussian" else output[:, None]
        each = point_loss(self.kind, by_loop, labels[:, None])
        last = by_loop[:, -1]
        if self.kind == "logistic":
            beside = {"accuracy": (last > 0) == (labels > 0)}
        else:
            mean = last[..., 0] if self.kind == "gaussian" else last
            beside = {"mse": (mean - labels) ** 2}
        values = {"loss": each.mean(1), **beside}
        return {name: Mean.of(x.reshape(-1), weights.reshape(-1)) for name, x in values.items()}


def point_loss(kind: str, output: Float[Array, "..."], labels: Float[Array, "..."]) -> Array:
    """The loss of each point; see `InContext.kind`."""
    if kind == "logistic":
        return optax.sigmoid_binary_cross_entropy(output, (labels + 1) / 2)
    if kind == "gaussian":
        return output[..., 1] + 0.5 * ((labels - output[..., 0]) * jnp.exp(-output[..., 1])) ** 2
    return (output - labels) ** 2


def _flat(each: Mapping[str, Mapping[str, Mean]]) -> dict[str, Mean]:
    """Metrics by name, `network_metric` where there are several networks."""
    return {
        f"{network}_{name}" if network else name: mean
        for network, metrics in each.items()
        for name, mean in metrics.items()
    }
