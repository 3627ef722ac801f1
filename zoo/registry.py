"""Variant names and where they live; creating a model from its name.

A model file under `zoo/models` ends in two tables: `VARIANTS` (name -> `Variant`) and `CHECKPOINT`
(layout -> rules). `SYSTEMS` below says which names a file may define, so that asking for one name
imports one file.
"""

import dataclasses
import difflib
import fnmatch
import importlib
import numbers
import sys
from collections.abc import Mapping
from types import ModuleType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

if TYPE_CHECKING:
    import flax.linen as nn

SYSTEMS: dict[str, tuple[str, ...]] = {
    "zoo.models.vision.swin": ("swin_*_patch4_*", "swin_test"),
    "zoo.models.vision.dinat": ("dinat_*", "nat_*"),
    "zoo.models.vision.cswin": ("CSWin_*", "cswin_*"),
    "zoo.models.vision.favit": ("favit_*",),
    "zoo.models.vision.sret": ("SReT_*", "sret_*"),
    "zoo.models.vision.t2t_vit": ("t2t_vit_*",),
    "zoo.models.vision.activator": ("activator_*",),
    "zoo.models.vision.svt": ("svt_*",),
    "zoo.models.vision.gmm_vit": ("gmm_vit*",),
    "zoo.models.vision.gmm_hosts": ("gmm_[!v]*",),
    "zoo.models.vision.fmvit": ("fmvit_*",),
    "zoo.models.vision.vsa": ("ViTAEv2_VSA_*", "vitaev2_vsa_*"),
    "zoo.models.vision.vsa_swin": ("swin_vsa_*",),
    "zoo.models.vision.vit": ("vit_*", "deit_*"),
    "zoo.models.video.video_swin": ("swin_*_patch244_*", "video_swin_*"),
    "zoo.models.language.bert": ("bert_*", "minilm_*"),
    "zoo.models.language.gpt2": ("gpt2", "gpt2_*", "distilgpt2"),
    "zoo.models.language.gla": ("gla_*",),
    "zoo.models.language.deltanet": ("deltanet_*",),
    "zoo.models.timeseries.ltsf_linear": ("ltsf_*", "dlinear_*", "nlinear_*"),
    "zoo.models.timeseries.itransformer": ("itransformer_*",),
    "zoo.models.timeseries.t2": ("t2_*",),
    "zoo.models.timeseries.informer": ("informer_*",),
    "zoo.models.timeseries.autoformer": ("autoformer_*",),
    "zoo.models.timeseries.tempo": ("tempo_*",),
    "zoo.models.timeseries.s_mamba": ("s_mamba_*",),
    "zoo.models.timeseries.gateformer": ("gateformer_*",),
    "zoo.models.timeseries.patchtst": ("patchtst_*",),
    "zoo.models.signal.lmuformer": ("lmuformer_*",),
    "zoo.models.signal.spiking": ("slmu_rnn_*", "attn_ms_*", "spiking_*"),
    "zoo.models.signal.dynamicformer": ("dynamicformer_*",),
}


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
                    f"{self.module.__name__} has no field {key!r}{_closest(key, known)} "
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


def list_models(pattern: str = "*", task: str | None = None) -> list[str]:
    """Names of all variants that match a shell wildcard (`swin*`) and, if given, a task, sorted."""
    literal = _literal(pattern)
    names = []
    for path, globs in SYSTEMS.items():
        stems = [_literal(g) for g in globs]
        if any(stem.startswith(literal) or literal.startswith(stem) for stem in stems):
            for name, variant in importlib.import_module(path).VARIANTS.items():
                if fnmatch.fnmatchcase(name, pattern) and task in (None, variant.task):
                    names.append(name)
    return sorted(names)


def _literal(pattern: str) -> str:
    """What every match of a shell wildcard begins with."""
    return pattern.split("*")[0].split("?")[0].split("[")[0]


def info(name: str) -> Variant:
    """What is known of a variant: configuration, source, licence, published figures.

    Raises:
      ValueError: if there is no such variant; the sentence gives the closest names.
    """
    for path, globs in SYSTEMS.items():
        if any(fnmatch.fnmatchcase(name, g) for g in globs):
            variants = importlib.import_module(path).VARIANTS
            if name in variants:
                return variants[name]
    raise ValueError(
        f"There is no model {name!r}{_closest(name, list_models())} "
        "zoo.list_models() gives all names; it takes wildcards such as 'swin*'."
    )


def create(name: str, **overrides: Any) -> "nn.Module":
    """A module by variant name, with some fields replaced.

    >>> import zoo
    >>> zoo.create("swin_test", num_classes=7).num_classes
    7

    Raises:
      ValueError: for an unknown name or an unknown field, with the closest ones.
    """
    return info(name).create(**overrides)


def system(model: "nn.Module | str") -> ModuleType:
    """The model file that defines a module (or a variant): it has `VARIANTS` and `CHECKPOINT`."""
    cls = info(model).module if isinstance(model, str) else type(model)
    return sys.modules[cls.__module__]


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


def _closest(name: str, known: list[str]) -> str:
    """What may have been meant: close names, or names that begin closely."""

    def likeness(other: str) -> float:
        parts = (other, other[: len(name)])
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    close = sorted((k for k in known if likeness(k) > 0.6), key=likeness, reverse=True)[:3]
    return f"; did you mean {' or '.join(close)}?" if close else "."
