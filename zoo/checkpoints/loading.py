"""`zoo.load`: from a name and a file to a model and its variables."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from zoo import registry
from zoo.checkpoints import files, rules
from zoo.checkpoints.report import Report


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
    model = registry.create(name, **overrides)
    if files.is_orbax(source):
        from zoo.checkpoints import runs

        return model, runs.load_variables(source, model, sharding=sharding), Report()
    state = files.open_checkpoint(files.resolve(source), weights)
    variables, report = rules.convert_with_report(
        registry.layouts(model),
        state,
        model,
        sharding=sharding,
        weights=None if state.chosen else weights,
        param_dtype=model.param_dtype if "param_dtype" in overrides else None,
        **options,
    )
    report = dataclasses.replace(report, notes=(*state.notes, *report.notes))
    if str(report):
        print(report, file=sys.stderr)
    return model, variables, report
