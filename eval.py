"""Measure a run, or a published checkpoint, on held-out examples: a table and JSON.

    python eval.py runs/default-20260101-120000            the newest checkpoint of a run
    python eval.py runs/default-20260101-120000 --step 400
    python eval.py runs/forecaster --data.eval.split test --predictions forecasts.csv
    python eval.py configs/vision/swin_imagenet.py --checkpoint swin_tiny.pth --model.name swin_tiny

Fields can be set as in train.py: where data has moved, which split is measured. Exit codes: 0 done;
2 the command line or config is wrong; 1 all else, also a metric below what `--min-accuracy` asks.
"""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table


def main(args: list[str]) -> int:
    """Run a command line; gives the exit code."""
    from zoo.errors import ConfigError, TrainingError

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", help="a run directory, one step of it, or a config file")
    parser.add_argument("--step", type=int, help="which checkpoint of the run")
    parser.add_argument("--checkpoint", help="an official file, with a config file")
    parser.add_argument("--adapt", action="store_true", help="fit other sizes, as zoo.load does")
    parser.add_argument("--predictions", help="also write those of a run to this CSV or JSON file")
    parser.add_argument("--json", help="also write the JSON to this file")
    parser.add_argument("--min-accuracy", type=float, help="exit with 1 if it is not reached")
    options, rest = parser.parse_known_args(args)
    try:
        result = measure(options, rest)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(result, file)
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    table = Table("metric", "value", title=options.what)
    for name, value in result.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(json.dumps(result))
    if options.min_accuracy is not None and result.get("accuracy", 0.0) < options.min_accuracy:
        print(f"error: accuracy is below {options.min_accuracy}.", file=sys.stderr)
        return 1
    return 0


def measure(options: argparse.Namespace, rest: list[str]) -> dict:
    """The metrics that the options ask for."""
    from zoo.errors import ConfigError
    from zoo.training import command_line
    from zoo.training.evaluation import evaluate_checkpoint, evaluate_run

    if not options.what.endswith(".py"):
        if options.checkpoint:
            raise ConfigError(
                "A run has its own checkpoints; --checkpoint goes with a config file."
            )
        changes = command_line.changes(rest)
        if options.predictions:
            from zoo.prediction import predict_held_out

            predict_held_out(options.what, options.step, changes, options.predictions)
        metrics, step = evaluate_run(options.what, options.step, changes=changes)
        return {"step": step, **metrics}
    if not options.checkpoint:
        raise ConfigError("A config file needs --checkpoint FILE; give a run to measure a run.")
    _, command = command_line.parse([options.what, *rest])
    return evaluate_checkpoint(command.config, options.checkpoint, options.adapt)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
