"""The command line of `train.py`: a config file, then its fields by path."""

import ast
import contextlib
import dataclasses
import difflib
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from zoo.errors import ConfigError
from zoo.training.config import Command, Model, TrainConfig, load, load_file, to_json
from zoo.training.fields import TYPE, with_field

DEFAULT = "configs/default.py"
ORIGIN = "origin.json"
"""Beside a run's config.json: the config file and the flags that it was begun with."""
OWN = ("--data.", "--task.", "--methods.", "--evaluators.")
"""Parts that may be of the user's own classes: their fields are set here, the others by tyro."""
_BARE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=.*", re.DOTALL)  # partition.fsdp=2
_OVERRIDE = re.compile(
    r"--model\.((?P<network>[\w-]+)\.)?overrides\.(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL
)


def parse(args: Sequence[str], default: str = DEFAULT) -> tuple[str, Command]:
    """Read a command line.

    A run that is in `--workdir` goes on with its own config: with what it was begun with, then the
    flags given now. Without a config file it is the saved one.

    Returns:
      the config's name and the command with the resolved config.

    Raises:
      ConfigError: for an unknown field, a value of the wrong kind, or the config file of another
        run.
    """
    args = [f"--{a}" if _BARE.fullmatch(a) else a for a in args]
    path, args = _config_path(args)
    run = _workdir(args)
    begun = _begun(run)
    saved = run / "config.json" if run is not None else Path()
    if path is None and begun is not None and not _whole(saved):
        path = begun["config"]
    origin = None
    if begun is not None and str(Path(path or begun["config"]).resolve()) == begun["config"]:
        all_args = [*begun["args"], *_of_config(args)]  # a later flag goes before an earlier one
        origin = {"config": begun["config"], "args": all_args}
        args = args if path is None else [*begun["args"], *args]
    own, rest = _own(args)
    if path is None and saved.is_file():
        base, name = load(saved, dict(own)), run.name
    else:
        path, same = path or default, origin is not None
        base, name = load_file(path), Path(path).stem
        for place, value in own:
            base = with_field(base, place.split("."), value, f"--{place}")
        if saved.is_file() and not same:
            _check_same_run(base, path, run)
        origin = origin or {"config": str(Path(path).resolve()), "args": _of_config(args)}
    overrides, rest = _model_overrides(rest)
    command = Command(config=dataclasses.replace(base, model=_overridden(base.model, overrides)))
    command = _tyro(rest, command, f"train.py {path or default}")
    return name, dataclasses.replace(command, origin=origin)


def changes(args: Sequence[str]) -> dict[str, str]:
    """Flags as fields of a saved config: `data.eval.split` -> "val".

    Raises:
      ConfigError: for what is no flag with a value.
    """
    args = [f"--{a}" if _BARE.fullmatch(a) else a for a in args]
    found, i = {}, 0
    while i < len(args):
        flag, equals, value = args[i].partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} is no field; give --FIELD VALUE, as --data.eval.path NEW.")
        if not equals and i + 1 == len(args):
            raise ConfigError(f"{flag} needs a value.")
        found[flag.removeprefix("--")] = value if equals else args[i + 1]
        i += 1 if equals else 2
    return found


def _workdir(args: list[str]) -> Path | None:
    """The run directory that the flags name."""
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag == "--workdir":
            value = value if equals else (args[i + 1] if i + 1 < len(args) else "")
            return Path(value) if value else None
    return None


def _of_config(args: list[str]) -> list[str]:
    """The flags that a run remembers: not its place, nor how it is spread over devices."""
    kept: list[str] = []
    skip = False
    for arg in args:
        flag, equals, _ = arg.partition("=")
        if skip:
            skip = False
        elif flag in ("--profile", "--distributed"):
            continue
        elif flag == "--workdir" or flag.startswith("--partition."):
            skip = not equals
        else:
            kept.append(arg)
    return kept


def _begun(run: Path | None) -> dict[str, Any] | None:
    """With which config file and flags a run was begun."""
    try:
        begun = json.loads((run / ORIGIN).read_text()) if run is not None else None
        return begun if begun and isinstance(begun["args"], list) and begun["config"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _whole(saved: Path) -> bool:
    """Whether a saved config is there, without arrays in memory, which only its file has."""
    try:
        text = saved.read_text(encoding="utf-8")
        return '"unsaved"' not in text and isinstance(json.loads(text), dict)
    except (OSError, ValueError):
        return False


def _own(args: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes flags of the parts that a user may have written out: `(place, text)` each."""
    own, rest, i = [], [], 0
    while i < len(args):
        flag, equals, value = args[i].partition("=")
        i += 1
        if not flag.startswith(OWN):
            rest.append(args[i - 1])
            continue
        if not equals:
            if i == len(args):
                raise ConfigError(f"{flag} needs a value.")
            value, i = args[i], i + 1
        own.append((flag.removeprefix("--"), value))
    return own, rest


def _check_same_run(base: TrainConfig, path: str, run: Path) -> None:
    """Refuse to go on with a run by the config file of another one.

    Raises:
      ConfigError: if the network or the task is another.
    """
    try:
        saved = json.loads((run / "config.json").read_text())
        other = {k: saved[k] for k in ("model", "task")}
    except (OSError, ValueError, KeyError, TypeError):
        return
    ours = {k: to_json(getattr(base, k)) for k in other}
    names = [{"name": v.get("name"), TYPE: v.get(TYPE)} for v in (other["model"], ours["model"])]
    if names[0] != names[1] or other["task"].get(TYPE) != ours["task"].get(TYPE):
        raise ConfigError(
            f"{run} is a run of another network or task than {path} describes; continue it with "
            f"--workdir {run} and no config file, or choose another --workdir."
        )


def _config_path(args: list[str]) -> tuple[str | None, list[str]]:
    """The positional argument that names a config file, and the other arguments."""
    for i, arg in enumerate(args):
        value_of_flag = i > 0 and args[i - 1].startswith("--") and "=" not in args[i - 1]
        if not arg.startswith("-") and (i == 0 or (arg.endswith(".py") and not value_of_flag)):
            return arg, args[:i] + args[i + 1 :]
    return None, args


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
                near = f"{place}{close[0]}" if close else f"--{part}" if part in roots else ""
                hint = f"; did you mean {near.replace('_', '-')}?" if near else "."
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
