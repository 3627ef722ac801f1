"""Setting one field of a config by its path, at any depth: of dataclasses, tuples, saved JSON."""

import ast
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal

from zoo.errors import ConfigError

TYPE = "_type"  # the key that says which dataclass a JSON object is


def with_field(node: Any, place: Sequence[str], text: str, flag: str) -> Any:
    """A dataclass, tuple or saved JSON with one field, at any depth, read from a text.

    Args:
      node: what has the field.
      place: names of fields, from the outside in; numbers in tuples.
      text: the value, as on a command line.
      flag: for messages.

    Raises:
      ConfigError: if there is no such field, or the text does not fit it.
    """
    if not place:
        return _read(text, node, flag)
    name, *rest = place
    name = name.replace("-", "_")
    if isinstance(node, tuple | list):
        if not name.isdecimal() or int(name) >= len(node):
            raise ConfigError(f"{flag}: give a number below {len(node)}, not {name!r}.")
        items = list(node)
        items[int(name)] = with_field(items[int(name)], rest, text, flag)
        return type(node)(items)
    if isinstance(node, dict):
        known = [key for key in node if key != TYPE]
    elif dataclasses.is_dataclass(node):
        known = [f.name for f in dataclasses.fields(node) if f.init]
    else:
        known = []
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        before = flag.rpartition(".")[0]
        hint = f"; did you mean {before}.{close[0].replace('_', '-')}?" if close and not rest else (
            f"; it has {', '.join(known)}." if known else ".")  # fmt: skip
        raise ConfigError(f"There is no field {flag}{hint}")
    if isinstance(node, dict):
        return {**node, name: with_field(node[name], rest, text, flag)}
    value = getattr(node, name)
    new = _of_kind(node, name, text, flag) if not rest else with_field(value, rest, text, flag)
    try:
        return dataclasses.replace(node, **{name: new})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{flag} {text}: {error}") from None


def _of_kind(node: Any, name: str, text: str, flag: str) -> Any:
    """The value of a dataclass's field that a text says, of the kind that its annotation asks."""
    try:
        kind = typing.get_type_hints(type(node))[name]
    except Exception:  # names that are imported for type checkers only
        kind = Any
    choices = [c for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is Literal
               for c in typing.get_args(part)]  # fmt: skip
    value = _read(text, getattr(node, name), flag)
    parts = {kind, *typing.get_args(kind)}
    if str in parts and float not in parts and int not in parts and value is not None:
        value = text
    if float in parts and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if choices and value not in choices:
        raise ConfigError(f"{flag} is {text!r}; choose {', '.join(map(str, choices))}.")
    if parts & {int, float} and not isinstance(value, tuple) and str not in parts:
        wanted = int if int in parts and float not in parts else (int, float)
        fits = isinstance(value, wanted) and not isinstance(value, bool)
        if not fits and not (value is None and NoneType in parts):
            raise ConfigError(f"{flag} is {text!r}; give a number.")
    return value


def _read(text: str, before: Any, flag: str) -> Any:
    """A text as a value of the kind that was there before."""
    if dataclasses.is_dataclass(before) or (isinstance(before, dict) and TYPE in before):
        known = [f.name for f in dataclasses.fields(before)] if not isinstance(before, dict) else [
            key for key in before if key != TYPE]  # fmt: skip
        raise ConfigError(f"{flag} is no single value; set one of its fields: {', '.join(known)}.")
    if isinstance(before, str) and text not in ("None", "none"):
        return text
    if isinstance(before, bool):
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{flag} is {text!r}; give true or false.")
        return text.lower() in ("true", "1", "yes")
    words = {"true": True, "false": False, "none": None}
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = words.get(text.lower(), text)
    if isinstance(before, tuple | list) and not isinstance(value, tuple | list):
        value = tuple(text.split(",")) if isinstance(value, str) else (value,)
    if type(before) is int and not isinstance(value, int | NoneType):
        raise ConfigError(f"{flag} is {text!r}; give a whole number.")
    if type(before) is float and not isinstance(value, int | float | NoneType):
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{flag} is {text!r}; give a number.") from None
    return list(value) if isinstance(before, list) else value
