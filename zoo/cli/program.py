"""The program `zoo`: reads a command line, runs one command, says what went wrong."""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

import zoo
from zoo.cli import convert, export, methods, objectives, plan, predict, show, verify
from zoo.cli import list as list_models
from zoo.cli.arguments import Parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="zoo", description="Published transformer systems in JAX.")
    parser.add_argument("--version", action="version", version=f"zoo {zoo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (list_models, show, convert, export, predict, verify, plan, methods, objectives):
        command.add(commands)
    return parser


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename!r}" if error.filename else ""
        return f"Cannot read or write{where}: {error.strerror.lower()}."
    return str(error)


def _unforeseen(error: Exception) -> str:
    """A sentence on an error that nobody foresaw; the traceback goes to a file."""
    handle, path = tempfile.mkstemp(prefix="zoo-", suffix=".log")
    with os.fdopen(handle, "w") as log:
        traceback.print_exception(error, file=log)
    lines = str(error).strip().splitlines()
    reason = f": {lines[0].rstrip('.')}" if lines else ""
    return f"This fails for a reason that zoo did not foresee{reason}; {path} has the traceback."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except BrokenPipeError:  # the reader of our output has gone, as in `zoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"zoo: {_sentence(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"zoo: {_unforeseen(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
