"""`zoo export`: a model as a program that runs without the zoo."""

import argparse
from pathlib import Path
from typing import Any

import zoo
from zoo import registry
from zoo.cli import output
from zoo.cli.arguments import RequestError, add_command, add_fields, overrides

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def add(commands: Any) -> None:
    """Add the command to the program."""
    text = "Write a model as a program (jax.export) with its weights and its preprocessing."
    sub = add_command(commands, "export", run, text)
    sub.add_argument("name", help="a model, or a Hugging Face folder that says what it is")
    sub.add_argument("out", help="a new folder")
    sub.add_argument("--weights", metavar="SOURCE", help="file, folder, run or hub id to load")
    sub.add_argument("--batch", type=int, help="this batch size; default any")
    sub.add_argument("--length", type=int, help="this length of text; default any")
    sub.add_argument("--platforms", help="e.g. cpu,cuda,tpu; default what runs here")
    add_fields(sub)


def run(options: argparse.Namespace) -> int:
    """Export a model and say what its program takes and gives."""
    from zoo.serving import write_program

    folder, fields = Path(options.out), overrides(options.set)
    if folder.exists():
        raise RequestError(f"{options.out!r} exists already; give the name of a new folder.")
    platforms = [name.strip() for name in (options.platforms or "").split(",") if name.strip()]
    if unknown := [name for name in platforms if name not in PLATFORMS]:
        raise RequestError(f"There is no platform {unknown[0]!r}; give {', '.join(PLATFORMS)}.")
    is_folder = Path(options.name).is_dir()
    if options.weights is None and not is_folder:
        raise RequestError(
            f"zoo export {options.name} needs --weights SOURCE: a program without weights is of no "
            "use."
        )
    model, variables, report = zoo.load(options.name, options.weights, return_report=True, **fields)
    known = None if is_folder else registry.info(options.name).preprocessing
    about = write_program(
        folder,
        model,
        variables,
        preprocessing=report.preprocessing or known,
        batch=options.batch,
        length=options.length,
        platforms=platforms or None,
    )
    if options.json:
        output.print_json({"written": str(folder), **about})
    else:
        takes = ", ".join(f"{name} {shape}" for name, shape in about["inputs"].items())
        print(f"{folder}: takes {takes}; gives {about['outputs']}")
    return 0
