"""What the shapes of a model say, without computing anything."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import flax.linen as nn


def input_shapes(model: "nn.Module") -> dict[str, list[int]]:
    """The model's arguments and their shapes for a batch of one."""
    return {name: list(spec.shape) for name, spec in model.example_inputs().items()}


def shapes(model: "nn.Module") -> tuple[Any, dict[str, Any]]:
    """Variables as shapes, and the shape of every feature for a batch of one."""
    import jax
    import jax.numpy as jnp

    order = []  # JAX sorts the keys of a dict

    def run() -> tuple[Any, Any]:
        inputs: Any = {k: jnp.zeros(s.shape, s.dtype) for k, s in model.example_inputs().items()}
        features, variables = model.init_with_output(jax.random.key(0), **inputs, method="features")
        order.extend(features)
        return variables, features

    variables, features = jax.eval_shape(run)
    sizes = jax.tree.map(lambda leaf: list(leaf.shape), dict(features))
    return variables, {name: sizes[name] for name in order}


def count(variables: Mapping[str, Any]) -> int:
    """How many parameters there are."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
