"""`zoo convert`: a checkpoint in another published layout, or as an Orbax directory."""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo import registry
from zoo.cli import output
from zoo.cli.arguments import RequestError, add_command, add_fields, overrides

if TYPE_CHECKING:
    import flax.linen as nn


def add(commands: Any) -> None:
    """Add the command to the program."""
    text = "Rewrite a checkpoint in another published layout."
    sub = add_command(commands, "convert", run, text)
    sub.add_argument("name", help="the model that the checkpoint is of")
    sub.add_argument("source", help="file, Hugging Face directory, Orbax directory or hub id")
    sub.add_argument("out", help="NAME.safetensors, or a new directory for an Orbax checkpoint")
    sub.add_argument("--layout", help="naming of the .safetensors file; default the official one")
    sub.add_argument(
        "--adapt", action="store_true", help="resize tables and start heads afresh where needed"
    )
    sub.add_argument(
        "--weights", metavar="SET", help="raw, averaged, teacher or student, where a file has them"
    )
    sub.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave aside tensors of this name (with *); may be repeated",
    )
    sub.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="change names, e.g. 'trunk.*=blocks.*'; may be repeated",
    )
    add_fields(sub)


def convert(
    name: str,
    source: str,
    out: str,
    layout: str | None,
    adapt: bool,
    overrides: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """A checkpoint as a safetensors file of a published layout, or as an Orbax directory.

    `options` are those of `zoo.load`.

    Raises:
      RequestError: if `out` is neither, or `layout` has no place for the model.
    """
    target = Path(out)
    as_file = target.suffix == ".safetensors"
    if not as_file and target.suffix:
        raise RequestError(
            f"{out!r} is no name to write to: end it in .safetensors, or give a directory "
            "without a suffix for an Orbax checkpoint."
        )
    if not as_file and layout is not None:
        raise RequestError("A layout is for a .safetensors file; an Orbax directory has our names.")
    if as_file and target.is_dir():
        raise RequestError(f"{out!r} is a directory; give the name of a file.")
    if not as_file and target.exists():
        raise RequestError(f"{out!r} exists already; give the name of a new directory.")
    layouts = list(registry.system(name).layouts)
    if layout is not None and layout not in layouts:
        raise RequestError(f"{name} has no layout {layout!r}; it has {', '.join(layouts)}.")
    model, variables = zoo.load(name, source, adapt=adapt, **options, **overrides)
    target.parent.mkdir(parents=True, exist_ok=True)
    if as_file:
        from zoo.checkpoints import files

        state = zoo.export(model, variables, layout)
        files.save_safetensors(target, state, metadata={"format": "pt"})
        written = len(state)
    else:
        written = _save_orbax(target, model, variables)
    return {"name": name, "written": str(target), "tensors": written}


def _save_orbax(target: Path, model: "nn.Module", variables: Mapping[str, Any]) -> int:
    """A run directory with one checkpoint, moved into place when it is whole."""
    import jax

    from zoo.checkpoints.runs import Checkpoints

    collections = {name: tree for name, tree in variables.items() if name != "params"}
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        run = Path(folder) / "run"
        checkpoints = Checkpoints(run)
        try:
            parts = {"params": variables["params"], "collections": collections}
            checkpoints.save(0, parts, extra={"module": type(model).__name__})
        finally:
            checkpoints.close()
        run.rename(target)
    return len(jax.tree.leaves(variables))


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise RequestError(f"--rename takes OLD=NEW, not {text!r}.")
    return dict(text.split("=", 1) for text in texts)


def run(options: argparse.Namespace) -> int:
    """Convert a file and say what was written."""
    done = convert(
        options.name,
        options.source,
        options.out,
        options.layout,
        options.adapt,
        overrides(options.set),
        weights=options.weights,
        ignore=tuple(options.ignore),
        rename=_pairs(options.rename),
    )
    if options.json:
        output.print_json(done)
    else:
        print(f"{done['written']}: {done['tensors']} tensors of {done['name']}")
    return 0
