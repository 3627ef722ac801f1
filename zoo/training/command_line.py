"""The command line of `train.py`: a config file, then its fields by path."""

import ast
import contextlib
import dataclasses
import difflib
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from zoo.errors import ConfigError
from zoo.training.config import Command, Model, TrainConfig, load, load_file

DEFAULT = "configs/default.py"
_BARE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=.*", re.DOTALL)  # partition.fsdp=2
_OVERRIDE = re.compile(
    r"--model\.((?P<network>[\w-]+)\.)?overrides\.(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL
)


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
    command = Command(config=dataclasses.replace(base, model=_overridden(base.model, overrides)))
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


def _model_overrides(args: list[str]) -> tuple[dict[tuple[str, str], Any], list[str]]:
    """Takes `--model.overrides.KEY VALUE` out: the module's fields are known to it alone.

    Of several networks it is `--model.NETWORK.overrides.KEY`. Keys are of network ('') and field.
    """
    overrides, rest, i = {}, [], 0
    while i < len(args):
        found = _OVERRIDE.fullmatch(args[i])
        if found is None:
            rest.append(args[i])
            i += 1
            continue
        key, value = found["key"], found["value"]
        if value is None:
            i += 1
            if i == len(args):
                raise ConfigError(f"{args[i - 1]} needs a value.")
            value = args[i]
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = {"true": True, "false": False}.get(value, value)
        overrides[(found["network"] or "").replace("-", "_"), key.replace("-", "_")] = parsed
        i += 1
    return overrides, rest


def _overridden(
    model: Model | dict[str, Model], overrides: dict[tuple[str, str], Any]
) -> Model | dict[str, Model]:
    """The model, or models by name, with these fields.

    Raises:
      ConfigError: if a network is named that there is not.
    """
    models = {"": model} if isinstance(model, Model) else dict(model)
    for (name, key), value in overrides.items():
        if name not in models:
            known = ", ".join(
                f"--model.{n}.overrides" if n else "--model.overrides" for n in models
            )
            raise ConfigError(f"There is no network {name!r} to override {key} of; give {known}.")
        one = models[name]
        models[name] = dataclasses.replace(one, overrides={**one.overrides, key: value})
    return models[""] if isinstance(model, Model) else models


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
        unknown = _unknown(args, command)
        raise ConfigError(unknown or _sentence(said.getvalue(), prog)) from None


def _unknown(args: list[str], command: Command) -> str | None:
    """The sentence for the first flag that names no field; None if there is no such flag.

    Tyro says it, too, but not where the config has a source of the user's own: then it cannot list
    the fields.
    """
    roots = {f.name: getattr(command.config, f.name) for f in dataclasses.fields(command.config)}
    roots |= {f.name: None for f in dataclasses.fields(command) if f.name != "config"}
    for arg in args:
        if not arg.startswith("--"):
            continue
        flag, fields, place = arg.partition("=")[0], roots, "--"
        for part in flag.removeprefix("--").replace("-", "_").split("."):
            part = part if part in fields else part.removeprefix("no_")
            if part not in fields:
                close = difflib.get_close_matches(part, fields, 1)
                hint = f"; did you mean {place}{close[0].replace('_', '-')}?" if close else "."
                return f"There is no field {flag}{hint}"
            value, place = fields[part], f"{place}{part.replace('_', '-')}."
            inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            fields = {f.name: getattr(value, f.name) for f in inner}
    return None


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
