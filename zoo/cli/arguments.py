"""What the commands share in reading a command line."""

import argparse
import ast
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class RequestError(ValueError):
    """A request that cannot be served; the message is for the person who made it."""


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises RequestError instead of leaving the program."""
        raise RequestError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> Parser:
    """Add a command with its flag `--json`; `run` gives the exit status."""
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    sub.add_argument("--json", action="store_true", help="print JSON")
    return sub


def add_fields(sub: Parser) -> None:
    """Add `--set FIELD=VALUE`, which `overrides` reads."""
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the model, e.g. num_classes=10; may be repeated",
    )


def overrides(assignments: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """`["num_classes=10", "image_size=(32, 48)"]` -> fields; what is no Python literal is text."""
    fields = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise RequestError(f"{flag} takes FIELD=VALUE, not {assignment!r}.")
        try:
            fields[key.strip().replace("-", "_")] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            words = {"true": True, "false": False, "none": None}
            fields[key.strip().replace("-", "_")] = words.get(text.strip().lower(), text.strip())
    return fields
