"""What a model file says of itself: its variants, checkpoint layouts and the roles of its leaves.

A file under `zoo/models` ends in `SYSTEM = System(...)`. `of` finds the system of any module, also
of one that wraps another; `zoo.registry` finds it by a variant's name.
"""

import dataclasses
import difflib
import numbers
import re
import sys
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

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
    scale to [0, 1], subtract `mean`, divide by `std` (both RGB).
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: str = "bicubic"


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
            if not _fits(fields[key], types[key]):
                wanted = getattr(types[key], "__name__", "")
                wanted = wanted if isinstance(types[key], type) else str(types[key])
                raise ValueError(
                    f"{self.module.__name__} takes {key} as {wanted}, not {overrides[key]!r}."
                )
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

    def __post_init__(self) -> None:
        """Lets `init` and `apply` of its modules run on meshes with Explicit axes, too."""
        from zoo.layers.partition import on_any_mesh

        for module in {variant.module for variant in self.variants.values()}:
            for name in ("init", "apply"):
                setattr(module, name, on_any_mesh(getattr(module, name)))

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
        return jnp.dtype(name)
    except TypeError:
        raise ValueError(f"{key}={name!r} is no number type; use float32 or bfloat16.") from None


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a field's type; types other than plain numbers and text always fit."""
    parts = get_args(wanted)
    if get_origin(wanted) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(wanted) is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if wanted is NoneType:
        return value is None
    plain = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}
    if wanted not in plain:
        return value is not None
    return isinstance(value, plain[wanted]) and (wanted is bool or not isinstance(value, bool))


def closest(name: str, known: list[str]) -> str:
    """What may have been meant: close names, or names that begin closely."""

    def likeness(other: str) -> float:
        parts = (other, other[: len(name)])
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    close = sorted((k for k in known if likeness(k) > 0.6), key=likeness, reverse=True)[:3]
    return f"; did you mean {' or '.join(close)}?" if close else "."
