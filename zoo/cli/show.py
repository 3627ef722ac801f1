"""`zoo show`: everything known of one variant."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import zoo
from zoo import registry
from zoo.cli import output
from zoo.cli.arguments import add_command, add_fields, overrides
from zoo.shapes import count, input_shapes, shapes


def add(commands: Any) -> None:
    """Add the command to the program."""
    sub = add_command(commands, "show", run, "All that is known of a model, with its shapes.")
    sub.add_argument("name", help="a name that zoo list shows")
    add_fields(sub)


def describe(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a variant, and what its shapes say, without computing anything."""
    variant = zoo.info(name)
    model = zoo.create(name, **overrides)
    variables, features = shapes(model)
    system = registry.system(model)
    return {
        "name": name,
        "task": variant.task,
        "module": f"{registry.file_of(name)}.{type(model).__name__}",
        "parameters": count(variables),
        "published parameters": variant.params,
        "flops": variant.flops,
        "metric": variant.metric,
        "paper": variant.paper,
        "source": variant.code,
        "licence": variant.licence,
        "files": {file.name: file.sha256 for file in variant.files},
        "layouts": list(system.layouts),
        "preprocessing": variant.preprocessing and dataclasses.asdict(variant.preprocessing),
        "input": input_shapes(model),
        "fields": {
            f.name: _readable(getattr(model, f.name))
            for f in dataclasses.fields(model)
            if f.name not in ("parent", "name")
        },
        "features": features,
    }


def _readable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_readable(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _readable(v) for k, v in value.items()}
    return getattr(value, "__name__", str(value))


def run(options: argparse.Namespace) -> int:
    """Print what is known of a variant."""
    facts = describe(options.name, overrides(options.set))
    if options.json:
        output.print_json(facts)
        return 0
    facts["flops"] = output.quantity(facts["flops"], " multiply-adds of one example").strip()
    facts["files"] = [
        name + (f" (sha256 {digest})" if digest else "") for name, digest in facts["files"].items()
    ]
    facts["input"] = {name: output.shape(shape) for name, shape in facts["input"].items()}
    features = facts.pop("features")
    rows = [{"": key, " ": output.one_line(value)} for key, value in facts.items() if value]
    rows += [{"": f"feature {key}", " ": output.shape(shape)} for key, shape in features.items()]
    output.print_table(rows)
    return 0
