"""`zoo predict`: what a run, or a published checkpoint, says of inputs of one's own."""

import argparse
from pathlib import Path
from typing import Any

from zoo.cli.arguments import RequestError, add_command, add_fields, overrides


def add(commands: Any) -> None:
    """Add the command to the program."""
    text = "What a run, or a published checkpoint, says of your own inputs."
    sub = add_command(commands, "predict", run, text)
    sub.add_argument(
        "what",
        help="a run directory, one step of it, a Hugging Face folder that says "
        "what it is, or a model's name",
    )
    sub.add_argument(
        "inputs",
        nargs="*",
        metavar="[WEIGHTS] INPUT",
        help="of a name first its weights; then images, folders, videos, CSV files, texts, .npz "
        "files of arrays, or - for a line each of standard input. Of a run without inputs: its "
        "held-out examples",
    )
    sub.add_argument("--out", help="a .csv, .json, .jsonl or .npz file, or a folder, which also "
                     "gets pictures and restored images")  # fmt: skip
    sub.add_argument("--step", type=int, help="which checkpoint of the run")
    sub.add_argument("--top", type=int, default=5, help="classes to name (default: 5)")
    sub.add_argument("--batch-size", type=int, help="examples at a time")
    sub.add_argument("--feature", help="give this intermediate of the network: embeddings")
    sub.add_argument("--steps", type=int, default=40, help="tokens to continue with (default: 40)")
    sub.add_argument("--seed", type=int, help="draw tokens with this seed, not the likeliest")
    sub.add_argument("--tokenizer", help="a tokenizer.json, vocab.txt, or vocab.json")
    sub.add_argument("--column", default="text", help="of texts in a CSV file (default: text)")
    sub.add_argument("--table", action="append", default=[], metavar="FIELD=VALUE",
                     help="how a CSV file of series is read, a field of zoo.data.series.Table such "
                     "as date=when; may be repeated")  # fmt: skip
    sub.add_argument("--classes", help="a file with the names of the classes, one a line")
    add_fields(sub)


def run(options: argparse.Namespace) -> int:
    """Print the answers, or write them."""
    import dataclasses

    from zoo.checkpoints.runs import is_run
    from zoo.prediction import answers, held_out_answers, of_model, of_run, outputs
    from zoo.prediction.answers import Options
    from zoo.prediction.predictor import text_tokenizer, with_feature

    sizes = (options.top, options.steps, options.batch_size)
    if min(size for size in sizes if size is not None) < 1:
        raise RequestError("--top, --steps and --batch-size must be at least 1.")
    if "" in options.inputs:
        raise RequestError("An input is empty; give a file, a folder, a text, or - for lines.")
    out = Path(options.out) if options.out else None
    is_file = out is not None and out.suffix.lower() in outputs.SUFFIXES
    if out is not None and not is_file and not out.is_dir() and (out.suffix or out.exists()):
        raise RequestError(
            f"{options.out!r} is no place to write to: end a file in "
            f"{', '.join(outputs.SUFFIXES)}, or give a folder."
        )
    folder = out.parent if is_file and out is not None else out
    table = overrides(options.table, "--table")
    how = Options(options.top, options.steps, folder, options.column, options.seed, table)
    inputs = list(options.inputs)
    if is_run(options.what):
        changes = {key: str(value) for key, value in overrides(options.set).items()}
        if not inputs:
            rows = held_out_answers(options.what, options.step, changes, how)
            return _finish(rows, out, folder, options.json)
        predictor = of_run(options.what, options.step, changes)
        if options.tokenizer:
            length = predictor.inputs["tokens"].shape[1]
            found = text_tokenizer(Path(options.tokenizer), length, True)
            predictor = dataclasses.replace(predictor, tokenizer=found)
    else:
        named: str | None = options.what
        if (Path(options.what) / "config.json").is_file():
            named, inputs = None, [options.what, *inputs]
        elif Path(options.what).is_dir() or "/" in options.what:
            raise RequestError(
                f"There is no checkpoint of a run in {options.what!r}, and no config.json."
            )
        if len(inputs) < 2 and named is None:
            raise RequestError(f"Give an input, too: zoo predict {options.what} INPUT...")
        if options.step is not None:
            raise RequestError(f"--step is of a run, and {options.what!r} is none.")
        if len(inputs) < 2:
            raise RequestError(
                f"{options.what!r} is no run directory; of a model's name give its weights and an "
                "input: zoo predict NAME WEIGHTS INPUT..."
            )
        weights, *inputs = inputs
        predictor = of_model(named, weights, tokenizer=options.tokenizer, **overrides(options.set))
    if options.tokenizer and "tokens" not in predictor.inputs:
        raise RequestError(f"--tokenizer is for texts, and {options.what!r} does not read any.")
    if options.classes:
        try:
            names = Path(options.classes).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise RequestError(f"{options.classes!r} is no text of names.") from None
        count = getattr(predictor.network, "num_classes", len(names))
        if len(names) != count:
            raise RequestError(
                f"{options.classes!r} has {len(names)} names, and the model {count} classes; give "
                "one a line, in the order of their numbers."
            )
        predictor = dataclasses.replace(predictor, facts={**predictor.facts, "classes": names})
    if options.batch_size or "-" in inputs:  # a line is answered before the next one comes
        predictor = dataclasses.replace(predictor, batch_size=options.batch_size or 1)
    if options.feature:
        predictor = with_feature(predictor, options.feature)
    return _finish(answers(predictor, inputs, how), out, folder, options.json)


def _finish(rows: Any, out: Path | None, folder: Path | None, as_json: bool) -> int:
    from zoo.prediction import outputs

    if out is None:
        outputs.show(rows, as_json)
        return 0
    target = out / "predictions.csv" if out == folder else out
    print(f"{target}: {outputs.write(rows, target)} rows")
    return 0
