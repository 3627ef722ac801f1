"""The command line of `train.py`: a config file, then its fields by path."""

import ast
import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from zoo.errors import ConfigError
from zoo.training.config import Command, TrainConfig, load, load_file

DEFAULT = "configs/default.py"
_BARE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=.*", re.DOTALL)  # partition.fsdp=2
_OVERRIDE = "--model.overrides."


def parse(args: Sequence[str], default: str = DEFAULT) -> tuple[str, Command]:
    """Read a command line.

    Without a config file, a run directory given by `--workdir` continues with its own config.

    Returns:
      the config's name and the command with the resolved config.

    Raises:
      ConfigError: for an unknown field or a value of the wrong kind.
    """
    args = [f"--{a}" if _BARE.fullmatch(a) else a for a in args]
    path, args = _config_path(args)
    base, name = _base(path, args, default)
    overrides, args = _model_overrides(args)
    merged = {**base.model.overrides, **overrides}
    model = dataclasses.replace(base.model, overrides=merged)
    command = Command(config=dataclasses.replace(base, model=model))
    return name, _tyro(args, command, f"train.py {path or default}")


def _config_path(args: list[str]) -> tuple[str | None, list[str]]:
    """The positional argument that names a config file, and the other arguments."""
    for i, arg in enumerate(args):
        value_of_flag = i > 0 and args[i - 1].startswith("--") and "=" not in args[i - 1]
        if not arg.startswith("-") and (i == 0 or (arg.endswith(".py") and not value_of_flag)):
            return arg, args[:i] + args[i + 1 :]
    return None, args


def _base(path: str | None, args: list[str], default: str) -> tuple[TrainConfig, str]:
    if path is not None:
        return load_file(path), Path(path).stem
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag == "--workdir":
            value = value if equals else (args[i + 1] if i + 1 < len(args) else "")
            saved = Path(value) / "config.json"
            if value and saved.is_file():
                return load(saved), Path(value).name
    return load_file(default), Path(default).stem


def _model_overrides(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes `--model.overrides.KEY VALUE` out: the module's fields are known to it alone."""
    overrides, rest, i = {}, [], 0
    while i < len(args):
        if not args[i].startswith(_OVERRIDE):
            rest.append(args[i])
            i += 1
            continue
        key, equals, value = args[i].removeprefix(_OVERRIDE).partition("=")
        if not equals:
            i += 1
            if i == len(args):
                raise ConfigError(f"--model.overrides.{key} needs a value.")
            value = args[i]
        try:
            overrides[key.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[key.replace("-", "_")] = {"true": True, "false": False}.get(value, value)
        i += 1
    return overrides, rest


def _tyro(args: list[str], command: Command, prog: str) -> Command:
    said = io.StringIO()
    helping = any(a in ("-h", "--help") for a in args)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if not helping:
                stack.enter_context(contextlib.redirect_stderr(said))
                stack.enter_context(contextlib.redirect_stdout(said))
            return tyro.cli(Command, default=command, args=args, prog=prog)
    except SystemExit as stop:
        if helping or not stop.code:
            raise
        raise ConfigError(_sentence(said.getvalue(), prog)) from None


def _sentence(box: str, prog: str) -> str:
    """Tyro's boxed message (drawn in Unicode or, for a plain output, in ASCII) as a sentence."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:-1]:
        line = line.strip("│|+ \t")
        if line and not line.strip("─-"):
            parts.append([])
        elif line:
            parts[-1].append(line)
    parts = [part for part in parts if part]
    text = " ".join(parts[0]) if parts else box.strip()
    close = [line.split()[0] for part in parts[1:] for line in part if line.startswith("--")]
    hint = f"; did you mean {close[0]}?" if close and "nrecognized" in text else "."
    return f"{text.rstrip('.')}{hint} python {prog} --help lists all fields."
