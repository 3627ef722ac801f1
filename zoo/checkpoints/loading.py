"""`zoo.load`: from a name and a file to a model and its variables."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from zoo import registry
from zoo.checkpoints import files, hub_config, rules
from zoo.checkpoints.mismatch import CheckpointMismatch
from zoo.checkpoints.report import Report
from zoo.system import Variant

OF_THE_FILE = frozenset({"distilled_head", "masked_pooler"})
"""Fields that a file decides, if the caller does not: which of two published forms it has."""


def load(
    name: str | os.PathLike,
    source: str | os.PathLike | None,
    overrides: Mapping[str, Any],
    *,
    weights: str | None = None,
    sharding: Any = None,
    **options: Any,
) -> tuple[nn.Module, dict, Report]:
    """See `zoo.load`; `options` are those of `zoo.checkpoints.rules.convert`."""
    if isinstance(source, Mapping):
        raise ValueError(
            f"zoo.load({os.fspath(name)!r}, SOURCE) takes a file or folder, not tensors in memory; "
            f"zoo.convert({os.fspath(name)!r}, TENSORS) takes those."
        )
    named = source is not None
    name = os.fspath(name)
    if source is None:
        source = name
        if not Path(name).exists() and "/" not in name:
            registry.info(name)  # an unknown name is said to be one
            raise ValueError(f"zoo.load({name!r}, SOURCE) needs the file or folder of the weights.")
    if files.is_orbax(source):
        if not named:
            raise ValueError(f"{os.fspath(source)!r} is a run: zoo.load(NAME, RUN) says of what.")
        return _run(registry.create(name, **overrides), source, sharding, weights, options)
    path = files.resolve(source)
    beside = hub_config.read(path)
    model, notes = _model(name if named else None, path, beside, overrides)
    state = files.open_checkpoint(path, weights)
    options |= {
        "sharding": sharding,
        "weights": None if state.chosen else weights,
        "param_dtype": model.param_dtype if "param_dtype" in overrides else None,
    }
    layouts, adapt = registry.layouts(model), bool(options.pop("adapt", False))
    free = {name for name in OF_THE_FILE - overrides.keys() if hasattr(model, name)}
    try:
        first = adapt and not free
        variables, report = rules.convert_with_report(layouts, state, model, adapt=first, **options)
    except CheckpointMismatch as error:
        chosen = {k: v for k, v in error.settings.items() if k in free}
        if first or (not adapt and (not chosen or len(chosen) < len(error.settings))):
            raise
        model = model.clone(**chosen)
        notes += [f"{name}={value!r}, as the file is." for name, value in chosen.items()]
        variables, report = rules.convert_with_report(layouts, state, model, adapt=adapt, **options)
    report = dataclasses.replace(
        report,
        notes=(*notes, *state.notes, *report.notes),
        preprocessing=beside.preprocessing,
    )
    if str(report):
        print(report, file=sys.stderr)
    return model, variables, report


def _model(
    name: str | os.PathLike | None,
    path: Path,
    beside: hub_config.Beside,
    overrides: Mapping[str, Any],
) -> tuple[nn.Module, list[str]]:
    """The module that a folder's settings and the caller's fields make, and what to say of it."""
    if name is None and beside.base is None:
        kinds = ", ".join(hub_config.KINDS)
        word = f" (it says {beside.model_type!r})" if beside.model_type else ""
        raise ValueError(
            f"{path} does not say which model it is: it has no config.json with a model_type that "
            f"is known here{word}; known are {kinds}. Give the name: zoo.load(NAME, {str(path)!r})."
        )
    variant = registry.info(str(name if name is not None else beside.base))
    known = {f.name for f in dataclasses.fields(variant.module)}
    said = {k: v for k, v in beside.hidden.items() if k in known}
    contradicted = {k: v for k, v in said.items() if k in overrides and not _same(overrides[k], v)}
    if contradicted:
        key, value = next(iter(contradicted.items()))
        raise ValueError(
            f"config.json in {path if path.is_dir() else path.parent} says {key}={value!r}, which "
            f"contradicts {key}={overrides[key]!r}; leave {key} out to take the file's."
        )
    fields: dict[str, Any] = dict(said)
    if name is None:
        shown = {k: v for k, v in beside.shown.items() if k in known}
        fields = {**shown, **said}
    made = variant.create()
    plain = {k: v for k, v in fields.items() if not _same(getattr(made, k), v)}
    notes = list(beside.notes)
    if plain and name is not None:
        values = ", ".join(f"{k}={v!r} (not {getattr(made, k)!r})" for k, v in plain.items())
        notes.append(f"config.json sets {values}.")
    notes += _image_notes(variant, beside)
    return variant.create(**{**plain, **overrides}), notes


def _image_notes(variant: Variant, beside: hub_config.Beside) -> list[str]:
    said, known = beside.preprocessing, variant.preprocessing
    if said is None or known is None or (_same(said.mean, known.mean) and said.std == known.std):
        return []
    return [
        f"preprocessor_config.json normalises with mean {said.mean} and std {said.std}, where the "
        f"variant has {known.mean} and {known.std}; the report's preprocessing is the file's."
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return one is not None and other is not None and abs(one - other) <= 1e-9 * abs(other)
    if isinstance(one, tuple) and isinstance(other, int):
        return set(one) == {other}
    return one == other


def _run(
    model: nn.Module,
    source: str | os.PathLike,
    sharding: Any,
    weights: str | None,
    options: Mapping[str, Any],
) -> tuple[nn.Module, dict, Report]:
    """The variables of a run of the trainer, adapted where asked for."""
    from zoo.checkpoints import runs

    averaged = weights != "raw"
    try:
        variables = runs.load_variables(source, model, sharding=sharding, averaged=averaged)
        return model, variables, Report()
    except CheckpointMismatch:
        if not options.get("adapt"):
            raise
    from zoo.checkpoints.leaves import flat_leaves, model_leaves

    layouts = registry.layouts(model)
    state = flat_leaves(runs.load_variables(source, averaged=averaged))
    rule = next(iter(layouts.values()))
    own = rules.Rules(
        [rules.Rule(path, path) for path in {*state, *model_leaves(model).unrolled}],
        fresh=rule.fresh,
        resize=rule.resize,
    )
    variables, report = rules.convert_with_report(
        {"zoo": own}, state, model, sharding=sharding, **options
    )
    print(report, file=sys.stderr)
    return model, variables, report
