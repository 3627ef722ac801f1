"""Calling any model with a batch: what all tasks share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array


def zeros_like_inputs(model: nn.Module, batch_size: int = 1) -> dict[str, Array]:
    """Zeros of the shapes that a model's `example_inputs` gives."""
    inputs = model.example_inputs(batch_size)
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}


def model_inputs(model: nn.Module, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The part of a batch that the model takes, by argument name.

    Raises:
      ValueError: if the batch has none of them.
    """
    names = model.example_inputs()
    inputs = {name: batch[name] for name in names if name in batch}
    if next(iter(names)) not in inputs:
        raise ValueError(
            f"{type(model).__name__} takes {', '.join(names)}, but the batch has only "
            f"{', '.join(batch)}; use data of the model's kind."
        )
    return inputs


def apply_model(
    model: nn.Module,
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    rng: Array | None,
    train: bool,
    method: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Output and updated collections (batch statistics in training, else none).

    `method` is that of the model, `features` for example; None: its `__call__`.
    """
    inputs = model_inputs(model, batch)
    rngs = {} if rng is None else {"dropout": rng, "sample": jax.random.fold_in(rng, 1)}
    mutable = [name for name in variables if name != "params"] if train else []
    if not mutable:
        return model.apply(variables, **inputs, train=train, rngs=rngs, method=method), {}
    return model.apply(variables, **inputs, train=train, rngs=rngs, mutable=mutable, method=method)
