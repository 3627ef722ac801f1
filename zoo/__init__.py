"""Flax Zoo: published transformer systems as pure functions.

    import zoo

    zoo.list_models("swin*")
    model = zoo.create("swin_tiny_patch4_window7_224", num_classes=10)
    model, variables = zoo.load("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.pth")
    logits = model.apply(variables, images)
    state_dict = zoo.export(model, variables)

Nothing here imports an architecture, Flax or a checkpoint reader before it is needed.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from zoo import registry
from zoo.registry import create, info, list_models
from zoo.system import File, Preprocessing, Variant

if TYPE_CHECKING:
    import flax.linen as nn
    import numpy as np

    from zoo.checkpoints.report import Report

__version__ = "0.1.0"
__all__ = [
    "File",
    "Preprocessing",
    "Variant",
    "convert",
    "create",
    "export",
    "info",
    "list_models",
    "load",
]


@overload
def load(
    name: "str | os.PathLike",
    source: "str | os.PathLike | None" = None,
    *,
    adapt: bool = False,
    sharding: Any = None,
    rng: Any = None,
    weights: str | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    return_report: Literal[False] = False,
    **overrides: Any,
) -> "tuple[nn.Module, dict]": ...
@overload
def load(
    name: "str | os.PathLike",
    source: "str | os.PathLike | None" = None,
    *,
    adapt: bool = False,
    sharding: Any = None,
    rng: Any = None,
    weights: str | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    return_report: Literal[True],
    **overrides: Any,
) -> "tuple[nn.Module, dict, Report]": ...
def load(
    name: "str | os.PathLike",
    source: "str | os.PathLike | None" = None,
    *,
    adapt: bool = False,
    sharding: Any = None,
    rng: Any = None,
    weights: str | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    return_report: bool = False,
    **overrides: Any,
) -> "tuple[nn.Module, dict] | tuple[nn.Module, dict, Report]":
    """Create a model and fill it from a published file or a run of the trainer.

    What a person should know of the loading (a prefix stripped, tensors left aside, leaves that
    are fresh or resized, which set of weights was taken) is printed to standard error.

    Args:
      name: a variant's name (`list_models()` shows them), or a Hugging Face folder or hub id whose
        `config.json` says what it is; `source` is then left out.
      source: an official file (`.pth`, `.pt`, `.bin`, `.safetensors`, `.npz`, `.msgpack`), a
        Hugging Face directory or sharded index, an Orbax directory that the trainer wrote, or a hub
        id (`org/name`) where a network and `huggingface_hub` are present. Settings in its
        `config.json` that shapes cannot show are set, or refused where they contradict `overrides`.
      adapt: allow what differs in shape to be adapted as the official code does it: position
        tables are interpolated, a head for another number of classes starts fresh.
      sharding: None, a `jax.sharding.Sharding`, or `f(path, shape) -> Sharding`.
      rng: key for fresh heads (`adapt=True`); default `jax.random.key(0)`.
      weights: which set, where a file holds several: `raw`, `averaged`, `teacher`, `student`, or
        the name of its entry. By default the one that the published evaluation takes.
      ignore: patterns (with `*`) of tensors in the file that are left aside.
      rename: pattern -> name, each with as many `*`, for files that name tensors otherwise.
      return_report: give the `zoo.checkpoints.report.Report` as a third result.
      **overrides: fields of the module that replace the variant's. A `param_dtype` here also sets
        the type of the leaves, which otherwise have the file's.

    Returns:
      `(model, variables)`, ready for `model.apply(variables, inputs)`.

    Raises:
      ValueError: for an unknown name or field, a file that is unsafe or broken, or tensors
        that do not fit (`CheckpointMismatch` lists all of them at once).
      FileNotFoundError: if there is no such file.
    """
    from zoo.checkpoints import loading

    model, variables, report = loading.load(
        name, source, overrides, adapt=adapt, sharding=sharding, rng=rng, weights=weights,
        ignore=ignore, rename=rename,
    )  # fmt: skip
    return (model, variables, report) if return_report else (model, variables)


def convert(
    model: "str | nn.Module",
    state_dict: Mapping[str, Any],
    *,
    adapt: bool = False,
    sharding: Any = None,
    rng: Any = None,
    weights: str | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> dict:
    """Turn an official state dict (names to arrays) into the model's variables.

    Args:
      model: a variant's name or a module made by `create`.
      state_dict: NumPy arrays (or lazy tensors of `zoo.checkpoints`) by official name.
      adapt: as in `load`.
      sharding: as in `load`.
      rng: as in `load`.
      weights: as in `load`.
      ignore: as in `load`.
      rename: as in `load`.

    Raises:
      CheckpointMismatch: naming all missing, unexpected and misshapen tensors.
    """
    from zoo.checkpoints import rules

    module = create(model) if isinstance(model, str) else model
    return rules.convert(
        registry.layouts(module), state_dict, module, adapt=adapt, sharding=sharding, rng=rng,
        weights=weights, ignore=ignore, rename=rename,
    )  # fmt: skip


def export(
    model: "str | nn.Module", variables: Mapping[str, Any], layout: str | None = None
) -> "dict[str, np.ndarray]":
    """The official state dict of these variables: `convert` backwards, bit for bit.

    Args:
      model: a variant's name or a module made by `create`.
      variables: what `load`, `convert` or `model.init` gave.
      layout: which published naming (a key of the system's `layouts`); default the official
        one.
    """
    from zoo.checkpoints import rules

    module = create(model) if isinstance(model, str) else model
    return rules.export(registry.layouts(module), variables, module, layout=layout)
