"""What a run computes in: bfloat16 for networks that have no `dtype` of their own.

A network with a field `dtype` gets it set. Any other is handed bfloat16 parameters and inputs, so
that it computes in bfloat16 while the trained parameters and all reductions stay float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from zoo.tasks.task import Networks


@dataclass(frozen=True)
class Precision:
    """How variables and batches are cast for the networks that need it.

    Attributes:
      networks: of the run.
      half: names of those without a `dtype`; the only network of a run has the name ''.
    """

    networks: Networks
    half: tuple[str, ...] = ()

    def variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables whose parameters are bfloat16 where they must be."""
        if not self.half:
            return dict(variables)
        params = variables["params"]
        if self.half == ("",):
            return {**variables, "params": jax.tree.map(_half, params)}
        cast = {name: jax.tree.map(_half, params[name]) for name in self.half}
        return {**variables, "params": {**params, **cast}}

    def batch(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """A batch whose inputs are bfloat16 for an only network that has no `dtype`."""
        if self.half != ("",):
            return dict(batch)
        names = self.networks.example_inputs()
        return {name: _half(x) if name in names else x for name, x in batch.items()}


def compute_in(networks: Networks, precision: str) -> tuple[Networks, Precision]:
    """The networks, computing in `precision`, and what must be cast for those without a `dtype`."""
    if precision == "float32":
        return networks, Precision(networks)
    if isinstance(networks, nn.Module):
        if _has_dtype(networks):
            networks = networks.clone(dtype=jnp.bfloat16)
            return networks, Precision(networks)
        return networks, Precision(networks, ("",))
    half = tuple(name for name, network in networks.items() if not _has_dtype(network))
    networks = {
        name: network if name in half else network.clone(dtype=jnp.bfloat16)
        for name, network in networks.items()
    }
    return networks, Precision(networks, half)


def _has_dtype(network: nn.Module) -> bool:
    return "dtype" in type(network).__dataclass_fields__


def _half(x: Array) -> Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
