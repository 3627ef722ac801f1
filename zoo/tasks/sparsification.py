"""Training while masks of heads and weights change: any task of one network, and its methods.

`zoo.methods.gtsp` has the masks. Behind a step at which one of its methods is due, the gradients
that it decides by are taken once more, with nothing masked where weights may grow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.tasks.apply import model_inputs
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Phase, Task, Variables


@dataclass(frozen=True)
class Sparsified(Task):
    """A task whose network has `SparseHeads` or `SparseWeights` among its methods.

    Each microbatch counts as a step of their schedules.

    Attributes:
      task: what is learnt, with one network.
    """

    task: Task

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of the task."""
        return self.task.phases

    def init(self, networks: nn.Module, rng: PRNGKeyArray) -> dict[str, Any]:
        """As the task begins."""
        return self.task.init(networks, rng)

    def loss(
        self,
        networks: nn.Module,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The task's loss; the masks that the next step sees are among the collections."""
        from zoo.methods.gtsp import COLLECTION

        methods = _methods(networks)
        value, aux = self.task.loss(networks, variables, carry, batch, rng, phase)
        fixed = jax.lax.stop_gradient(dict(variables))
        step = fixed[COLLECTION]["step"] + 1
        due = jnp.array([m.is_due(step) for m in methods]).any()

        def renewed(_: None) -> dict[str, Any]:
            grads = self._gradients(networks, fixed, carry, batch, rng, phase)
            masks = fixed
            for method in methods:
                masks = {**masks, COLLECTION: method.renew(step, masks, grads)}
            return dict(masks[COLLECTION])

        masks = jax.lax.cond(due, renewed, lambda _: dict(fixed[COLLECTION]), None)
        collections = {**aux.collections, COLLECTION: {**masks, "step": step}}
        return value, Aux(aux.metrics, collections, aux.carry)

    def _gradients(
        self, networks: nn.Module, variables: Variables, carry: Any, batch: Batch, rng: Any,
        phase: str,
    ) -> dict[str, Any]:  # fmt: skip
        """Of the loss in all weights, masked ones included, and in what heads give."""
        from zoo.methods.gtsp import COLLECTION, PERTURBED, perturbations

        masks, params = (flatten_dict(dict(variables[c])) for c in (COLLECTION, "params"))
        for path in [p for p in masks if p[-1] == "kernel"]:
            params[path] = params[path] * masks[path].astype(params[path].dtype)
            masks[path] = jnp.ones_like(masks[path])
        given = {**variables, COLLECTION: unflatten_dict(masks)}
        zeros = perturbations(networks, given, model_inputs(networks, batch))

        def loss(params: Any, zeros: Any) -> Array:
            every = {**given, "params": params, **({PERTURBED: zeros} if zeros else {})}
            return self.task.loss(networks, every, carry, batch, rng, phase)[0]

        of_params, of_zeros = jax.grad(loss, (0, 1))(unflatten_dict(params), zeros)
        return {"params": of_params, PERTURBED: of_zeros}

    def metrics(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """Those of the task."""
        return self.task.metrics(networks, variables, batch)

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> Mapping[str, Array]:
        """As the task predicts."""
        return self.task.predict(networks, variables, batch)


def _methods(networks: nn.Module) -> tuple[Any, ...]:
    from zoo.methods.gtsp import SparseHeads, SparseWeights

    methods = getattr(networks, "methods", ())
    found = tuple(m for m in methods if isinstance(m, SparseHeads | SparseWeights))
    if not found:
        raise ValueError(
            "Sparsified needs SparseHeads or SparseWeights (zoo.methods) among the methods of its "
            "network; give one in the config's methods."
        )
    return found
