"""What a model file says of itself: its variants, checkpoint layouts and the roles of its leaves.

A file under `zoo/models` ends in `SYSTEM = System(...)`. `of` finds the system of any module, also
of one that wraps another; `zoo.registry` finds it by a variant's name.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from zoo.kinds import fits, said

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.checkpoints.ruleset import Rules


@dataclasses.dataclass(frozen=True)
class File:
    """A published checkpoint file: its official name and, where known, its SHA-256."""

    name: str
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How the authors feed images at evaluation.

    Resize the shorter side to `image size / crop` (both sides if `crop` is 1), cut the centre,
    scale to [0, 1], subtract `mean`, divide by `std` (both RGB). With `squash`, both sides are
    resized for any `crop`.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: str = "bicubic"
    squash: bool = False


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published configuration of a system.

    Attributes:
      module: the Linen module class.
      fields: its fields for this variant.
      task: what it is for, e.g. `image_classification`.
      params: the number of parameters, as published or as the authors' code counts them.
      flops: multiply-adds of one example, counted as the authors count.
      metric: the authors' figure with its data set.
      paper: title and arXiv number.
      code: the official repository.
      licence: licence of the published weights.
      files: the official checkpoint files.
      preprocessing: input pipeline of images; None for other inputs.
    """

    module: "type[nn.Module]"
    fields: Mapping[str, Any]
    task: str
    params: int | None = None
    flops: float | None = None
    metric: str = ""
    paper: str = ""
    code: str = ""
    licence: str = ""
    files: tuple[File, ...] = ()
    preprocessing: Preprocessing | None = None

    def create(self, **overrides: Any) -> "nn.Module":
        """The module with `overrides` in place of the variant's fields (see `zoo.create`)."""
        known = [
            f.name for f in dataclasses.fields(self.module) if f.name not in ("parent", "name")
        ]
        for key in overrides:
            if key not in known:
                raise ValueError(
                    f"{self.module.__name__} has no field {key!r}{closest(key, known)} "
                    f"Its fields are {', '.join(known)}."
                )
        fields = {**self.fields, **overrides}
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if isinstance(fields.get("image_size"), int):
            fields["image_size"] = (fields["image_size"],) * 2
        for key in ("dtype", "param_dtype"):
            if isinstance(fields.get(key), str):
                fields[key] = _dtype(key, fields[key])
        types = {f.name: f.type for f in dataclasses.fields(self.module)}
        for key in overrides:
            if not fits(fields[key], types[key]):
                raise ValueError(
                    f"{self.module.__name__} takes {key} as {said(types[key])}, not "
                    f"{overrides[key]!r}."
                )
        _check_sizes(self, fields, overrides)
        _check_stages(self, fields)
        return self.module(**fields)


@dataclasses.dataclass(frozen=True)
class System:
    """One model file's account of itself. Patterns are regular expressions of whole leaf paths.

    Attributes:
      variants: name -> published configuration.
      layouts: name of a published naming -> its checkpoint rules; the first is the official one.
      partition: path pattern -> logical dims, beside the rules of `zoo.training.partition`.
      frozen: leaves that are never trained: fixed tables, random features, tensors that only keep
        a published file complete. The trainer takes no gradient for them.
      no_decay: leaves without weight decay, beside those that `zoo.training.optimizer` names.
      decay: leaves with weight decay although `zoo.training.optimizer` or `no_decay` names them.
      depth: its matches in a path, in order, number the leaf's layer: layer-wise learning rates.
    """

    variants: Mapping[str, Variant]
    layouts: Mapping[str, "Rules"]
    partition: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = ()
    decay: tuple[str, ...] = ()
    depth: str = r"(?:stages|groups|blocks|layers)_(\d+)"

    def is_frozen(self, path: str) -> bool:
        """Whether the leaf of this path (`params` left out) is never trained."""
        return any(re.fullmatch(pattern, path) for pattern in self.frozen)


def of(module: "nn.Module") -> System | None:
    """The system that a module belongs to, or None for a module that is nobody's.

    A module's own class decides, then the classes it derives from (`nn.remat`, `nn.jit` and your
    own subclasses), then the module that it wraps: a field that holds a module (`zoo.methods`).
    """
    while True:
        for cls in type(module).__mro__:
            found = vars(sys.modules[cls.__module__]).get("SYSTEM")
            if isinstance(found, System):
                return found
        inner = wrapped(module)
        if inner is None:
            return None
        module = inner


def wrapped(module: "nn.Module") -> "nn.Module | None":
    """The one module among a module's fields, or None if there is none or several."""
    import flax.linen as nn

    held = [
        getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.name not in ("parent", "name")
    ]
    inner = [value for value in held if isinstance(value, nn.Module)]
    return inner[0] if len(inner) == 1 else None


def _dtype(key: str, name: str) -> Any:
    import jax.numpy as jnp

    try:
        found = jnp.dtype(name)
    except TypeError:
        raise ValueError(f"{key}={name!r} is no number type; use float32 or bfloat16.") from None
    if not jnp.issubdtype(found, jnp.inexact):
        raise ValueError(f"{key}={name!r} is no floating type; use float32 or bfloat16.")
    return found


_POSITIVE = re.compile(
    r"(\w+_)?(embed_dim|num_heads|patch_size|image_size|window_size|stride|channels)"
    r"|vocab_size|context_length|variates|max_positions|factor"
)
_SHARE = re.compile(r"(\w+_)?(dropout|drop_path)")


def _check_sizes(variant: Variant, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse numbers that no model can have: sizes below 1, shares above 1.

    A field may be what the variant or the class has, also where that is 0 or negative.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(variant.module)}
    name = variant.module.__name__
    for key in overrides:
        before = (variant.fields.get(key, defaults[key]), defaults[key])
        items = fields[key] if isinstance(fields[key], tuple) else (fields[key],)
        if any(fields[key] == one for one in before):
            continue
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int | float):
                continue
            least = 1 if _POSITIVE.fullmatch(key) else 0
            of_sign = isinstance(item, int) and not any(
                isinstance(one, int | float) and one < 0 for one in before
            )
            if of_sign and item < least:
                raise ValueError(f"{name} with {key}={fields[key]!r}: give {least} or more.")
            if _SHARE.fullmatch(key) and not 0 <= item <= 1:
                raise ValueError(f"{name} with {key}={fields[key]!r}: give a share from 0 to 1.")


def _check_stages(variant: Variant, fields: Mapping[str, Any]) -> None:
    """Refuse fields with one value a stage that disagree on how many stages there are."""
    types = {f.name: f.type for f in dataclasses.fields(variant.module)}
    before, now = variant.fields.get("depths"), fields.get("depths")
    if not isinstance(before, tuple) or not isinstance(now, tuple):
        return
    for key, old in variant.fields.items():
        a_stage = isinstance(old, tuple) and len(old) == len(before)
        a_stage = a_stage and get_args(types[key])[-1:] == (Ellipsis,)
        if a_stage and isinstance(fields[key], tuple) and len(fields[key]) != len(now):
            raise ValueError(
                f"{variant.module.__name__} with {key}={fields[key]} and depths={now}: give one "
                "for each stage."
            )


def closest(name: str, known: list[str]) -> str:
    """What may have been meant: close names, or names that begin closely."""

    def likeness(other: str) -> float:
        parts = (other, other[: len(name)])
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    close = sorted((k for k in known if likeness(k) > 0.6), key=likeness, reverse=True)[:3]
    return f"; did you mean {' or '.join(close)}?" if close else "."
