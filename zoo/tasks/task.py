"""What a task is: the contract between networks and the trainer.

A task says what is learnt, and the trainer does the rest: gradients, optimizers, meshes,
checkpoints. A task of one network derives from `OneNetwork` and gives `measure` and `predict`. A
task of several networks (GAN, teacher and student) or with a state of its own (environments,
memories) writes `loss` itself:

    @dataclass(frozen=True)
    class Gan(Task):
        phases = (Phase("discriminator", ("discriminator",)), Phase("generator", ("generator",)))

        def loss(self, networks, variables, carry, batch, rng, phase):
            ...
            return loss, Aux({"loss": Mean.of(each, batch["valid"])})

Everything here is a pure function of its arguments. A network that no phase trains is frozen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.tasks.apply import apply_model, check_inputs, zeros_like_inputs
from zoo.tasks.metrics import Mean

Networks = nn.Module | Mapping[str, nn.Module]
"""The network of a config, or its networks by name where `TrainConfig.model` names several."""

Variables = Mapping[str, Any]
"""Collection -> nested dicts of arrays. Of several networks each collection holds one tree a
network, by name: `variables["params"]["generator"]`; see `of_network`."""

Batch = Mapping[str, Array]


@dataclass(frozen=True)
class Phase:
    """One gradient and one update within a step.

    Attributes:
      name: what `Task.loss` is told.
      groups: optimizer groups that are updated. A leaf's group is what a method says, else the name
        of its network, or `train` where there is one network.
      repeats: how often in a row, each time with the same batch and other random numbers.
    """

    name: str = "train"
    groups: tuple[str, ...] = ("train",)
    repeats: int = 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["metrics", "collections", "carry"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Aux:
    """What a loss gives besides its value.

    Attributes:
      metrics: by name. The one called `loss` says by its `count` how much of the gradient this
        batch is where it is one of several (microbatches, replicas).
      collections: those of the networks' collections that have changed.
      carry: what the next step is handed; None if the task has no carry, or leaves it as it is.
    """

    metrics: Mapping[str, Mean]
    collections: Mapping[str, Any] = field(default_factory=dict)
    carry: Any = None


class Task:
    """The contract, with defaults for what most tasks need not say.

    Attributes:
      phases: what happens in a step, in order.
      metric: the one by which checkpoints are compared; see `lower_is_better`.
      checks_outputs: whether `check` wants the shapes of what `predict` gives.
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase(),)
    metric: ClassVar[str] = "loss"
    checks_outputs: ClassVar[bool] = False

    def check(
        self, networks: Networks, batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Refuse a batch that does not fit, on the host, before a device sees it.

        Args:
          networks: of the config.
          batch: of NumPy arrays.
          outputs: shapes of what `predict` gives if `checks_outputs`, else nothing.

        Raises:
          ValueError: one sentence that names what does not fit.
        """

    def init(self, networks: Networks, rng: PRNGKeyArray) -> dict[str, Any]:
        """First variables of the networks, from the shapes of their `example_inputs`."""
        if isinstance(networks, nn.Module):
            return dict(networks.init(rng, **zeros_like_inputs(networks)))
        keys = jax.random.split(rng, len(networks))
        return joined(
            {
                name: module.init(key, **zeros_like_inputs(module))
                for (name, module), key in zip(networks.items(), keys, strict=True)
            }
        )

    def init_carry(self, networks: Networks, rngs: PRNGKeyArray) -> Any:
        """What the first step is handed: arrays with one row for each of the keys, or nothing.

        Args:
          networks: as for every function.
          rngs: a key for each row of the batch.
        """
        return {}

    def loss(
        self,
        networks: Networks,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss of a phase in training: the mean over the counted examples of a batch.

        Args:
          networks: of the config.
          variables: of the networks, all of them; the trainer differentiates what the phase trains.
          carry: of the step before, or `init_carry`'s.
          batch: names to arrays, `valid [batch]` among them.
          rng: of this step (and phase, microbatch, replica).
          phase: its name.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def metrics(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """Metrics of one batch of held-out examples, in evaluation mode."""
        raise NotImplementedError(f"{type(self).__name__} has no metrics")

    def predict(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Array]:
        """What the networks say of a batch, by name; the first is what is asked for most."""
        raise NotImplementedError(f"{type(self).__name__} has no predict")


class OneNetwork(Task):
    """A task of one network, whose loss and metrics come from one call of it.

    Attributes:
      method: which of the network's methods is called; None is its `__call__`.
    """

    method: ClassVar[str | None] = None

    def check(
        self, networks: Networks, batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Refuse inputs of another kind than the network's.

        Raises:
          ValueError: one sentence that names what does not fit.
        """
        check_inputs(networks, batch)

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Metrics of an output, `loss` among them.

        Args:
          network: what gave it, for messages.
          output: of `method`.
          batch: what it is compared with.
          train: whether the loss is to be trained (smoothed labels, say) or reported.
        """
        raise NotImplementedError(f"{type(self).__name__} has no measure")

    def loss(
        self,
        networks: nn.Module,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The mean of `measure`'s loss."""
        output, collections = self.run(networks, variables, batch, rng)
        metrics = self.measure(networks, output, batch, True)
        return metrics["loss"].compute(), Aux(metrics, collections)

    def metrics(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """What `measure` says, in evaluation mode."""
        return self.measure(networks, self.run(networks, variables, batch)[0], batch, False)

    def run(
        self, network: nn.Module, variables: Variables, batch: Batch, rng: Array | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Output of `method` and changed collections: in training if there is a key."""
        return apply_model(network, variables, batch, rng, rng is not None, method=self.method)


def lower_is_better(metric: str) -> bool:
    """Whether a small value of a metric of this name is good: losses and errors."""
    words = ("loss", "error", "mse", "mae", "perplexity", "distance", "rate", "threshold", "fid")
    return any(word in metric.rpartition("/")[2].lower() for word in words)


def of_network(variables: Variables, name: str) -> dict[str, Any]:
    """The variables of one of several networks, as its `apply` takes them."""
    return {kind: trees[name] for kind, trees in variables.items() if name in trees}


def joined(each: Mapping[str, Variables]) -> dict[str, Any]:
    """The inverse of `of_network`: variables of several networks from those of each, by name."""
    variables: dict[str, Any] = {}
    for name, own in each.items():
        for kind, tree in own.items():
            variables.setdefault(kind, {})[name] = tree
    return variables
