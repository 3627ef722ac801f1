"""The leaves of a model's variables as flat paths, without any memory behind them.

Rules speak of the unrolled form (`layers_0/...`). A model built with `scan_layers=True` stores the
same parameters stacked (`layers/...`, a leading axis); `Leaves.slots` says where each unrolled leaf
lives.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

PARAMS = "params/"


@dataclass(frozen=True)
class Slot:
    """Place of an unrolled leaf: a path of the model's own tree and indices into leading axes."""

    path: str
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Leaves:
    """Shapes of all leaves of a model.

    Attributes:
      model: the module in its unrolled form, from which `unrolled` is taken.
      unrolled: path -> shape and type, as rules name them: relative to `params`, other collections
        with their name in front (`batch_stats/...`).
      stored: the same for the tree that the model really takes.
      slots: unrolled path -> where it is in `stored`.
      collections: names of the collections.
    """

    model: nn.Module
    unrolled: Mapping[str, jax.ShapeDtypeStruct]
    stored: Mapping[str, jax.ShapeDtypeStruct]
    slots: Mapping[str, Slot]
    collections: tuple[str, ...]

    @property
    def plain(self) -> nn.Module:
        """The model without the methods that listen to its calls: what rules read fields of."""
        from zoo.methods.method import Intercepted

        model = self.model
        return model.inner if isinstance(model, Intercepted) else model


def model_leaves(model: nn.Module) -> Leaves:
    """The leaves of `model.init`, from `jax.eval_shape`: nothing is computed or allocated."""
    try:
        hash(model)
    except TypeError:  # a field that is a list or a dict
        return _model_leaves.__wrapped__(model)
    return _model_leaves(model)


@functools.lru_cache(maxsize=64)  # shapes only: some hundred kilobytes a model
def _model_leaves(model: nn.Module) -> Leaves:
    variables = _shapes(model)
    collections = tuple(variables)
    stored = flat_leaves(variables)
    if not getattr(model, "scan_layers", False):
        return Leaves(model, stored, stored, {path: Slot(path) for path in stored}, collections)
    plain = model.clone(scan_layers=False)
    unrolled = flat_leaves(_shapes(plain))
    slots = {path: _slot(path, stored) for path in unrolled}
    return Leaves(plain, unrolled, stored, slots, collections)


def initialise(model: nn.Module, paths: Iterable[str], rng: jax.Array) -> dict[str, jax.Array]:
    """Freshly initialised leaves, only those named: XLA drops what initialises the others."""
    wanted = list(paths)

    def init(key: jax.Array) -> list[jax.Array]:
        flat = flat_leaves(_init(model, key))
        return [flat[path] for path in wanted]

    return dict(zip(wanted, jax.jit(init)(rng), strict=True)) if wanted else {}


def flat_leaves(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as `path -> leaf`, paths relative to `params` as rules write them."""
    flat = flatten_dict(dict(variables), sep="/")
    return {path.removeprefix(PARAMS): leaf for path, leaf in flat.items()}


def nested(leaves: Mapping[str, Any], collections: Iterable[str]) -> dict[str, Any]:
    """The inverse of `flat_leaves`; `collections` names those besides `params`."""
    others = tuple(f"{name}/" for name in collections if name != "params")
    flat = {p if p.startswith(others) else PARAMS + p: leaf for p, leaf in leaves.items()}
    return {"params": {}, **unflatten_dict(flat, sep="/")}


def _init(model: nn.Module, key: jax.Array) -> Mapping[str, Any]:
    inputs: dict[str, Any] = {
        name: jnp.zeros(s.shape, s.dtype) for name, s in model.example_inputs().items()
    }
    return model.init(key, **inputs)


def _shapes(model: nn.Module) -> Mapping[str, Any]:
    return jax.eval_shape(lambda: _init(model, jax.random.key(0)))


def _slot(path: str, stored: Mapping[str, Any]) -> Slot:
    if path in stored:
        return Slot(path)
    parts, index = [], []
    for part in path.split("/"):
        stem, _, number = part.rpartition("_")
        stacked = stem == "layers" and number.isdecimal()
        parts.append("layers" if stacked else part)
        index += [int(number)] if stacked else []
    if "/".join(parts) not in stored:
        raise ValueError(
            f"The scanned form of the model has no place for {path!r}: with scan_layers=True every "
            "layers_<i>/... must be a row of layers/...."
        )
    return Slot("/".join(parts), tuple(index))
