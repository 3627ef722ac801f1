"""Calling any model with a batch: what all tasks share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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


def check_inputs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse inputs of another kind than a model's, from their shapes and types.

    Raises:
      ValueError: naming the input, what it is and what the model takes.
    """
    wanted = model.example_inputs()
    for name in model_inputs(model, batch):
        array, example = np.asarray(batch[name]), wanted[name]
        if array.dtype.kind in "OSU":
            raise ValueError(f"{name} hold {_kind(array)}, not numbers; add a transform.")
        if name in PICTURES:
            channels = example.shape[-1]
            if array.ndim != len(example.shape):
                raise ValueError(
                    f"{name} have the shape {_shape(array)}, and {type(model).__name__} takes "
                    f"{_shape(example)}."
                )
            if array.shape[-1] != channels:
                first = array.shape[-3] == channels
                hint = f"give {channels} (ImageFolder(..., channels={channels}))"
                hint = "put the channels last" if first else hint
                raise ValueError(
                    f"{name} have the shape {_shape(array)}, and {type(model).__name__} takes "
                    f"{_shape(example)}: {hint}."
                )
            if array.dtype.kind in "iub" and jnp.issubdtype(example.dtype, jnp.floating):
                raise ValueError(
                    f"{name} are {array.dtype} numbers up to {array.max(initial=0)}; end the "
                    "transforms in Normalize, which scales them to floats."
                )
        elif jnp.issubdtype(example.dtype, jnp.integer) and array.dtype.kind not in "iub":
            raise ValueError(
                f"{name} are {array.dtype}, and {type(model).__name__} takes integers."
            )
        if name == "tokens" and (size := getattr(model, "vocab_size", None)):
            check_numbers("tokens", array, int(size), "vocab_size")


PICTURES = ("images", "clips", "frames")


def check_numbers(
    what: str, numbers: Any, count: int, field: str, masked: Any | None = None
) -> None:
    """Refuse numbers outside 0 to `count - 1`.

    Args:
      what: the numbers are, in the plural.
      numbers: any array of integers.
      count: how many there are for a model.
      field: of the model that says so.
      masked: True where a number does not count.

    Raises:
      ValueError: naming a number, how many are outside, and what to do.
    """
    numbers = np.asarray(numbers)
    outside = (numbers < 0) | (numbers >= count)
    outside = outside if masked is None else outside & ~masked
    if not outside.any():
        return
    counted = numbers if masked is None else numbers[~masked]
    low, high = int(counted.min()), int(counted.max())
    if low < 0:
        hint = f"the smallest is {low}, and they count from 0"
    elif low == 1 and high == count and field == "num_classes":
        hint = "they seem to count from 1; subtract it"
    else:
        hint = f"the largest is {high}: create the model with {field}={high + 1}"
    bad = int(numbers[outside].flat[0])
    raise ValueError(
        f"{int(outside.sum())} of {numbers.size} {what} are outside 0 to {count - 1}, such as "
        f"{bad}, for a model with {field}={count}; {hint}."
    )


def _kind(array: np.ndarray) -> str:
    first = array.reshape(-1)[0] if array.size else ""
    return f"{'text' if isinstance(first, str | bytes) else type(first).__name__} such as {first!r}"


def _shape(array: Any) -> str:
    return f"[{', '.join(map(str, array.shape[1:]))}] for each example"


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
