"""Whether values are of the kinds that a dataclass's annotations say: numbers, text, choices."""

import dataclasses
import numbers
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from zoo.errors import ConfigError


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of an annotated type.

    Of numbers, text, choices (`Literal`), the zoo's own classes, and tuples and unions of them;
    anything fits another annotation.
    """
    parts = get_args(wanted)
    if get_origin(wanted) is Annotated:
        return fits(value, parts[0])
    if get_origin(wanted) in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if get_origin(wanted) is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if get_origin(wanted) is tuple:
        if not isinstance(value, tuple | list):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(fits, value, parts))
    if wanted is NoneType:
        return value is None
    plain = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}
    if wanted not in plain:
        if getattr(wanted, "__module__", "").startswith("zoo.") and isinstance(wanted, type):
            return getattr(wanted, "_is_protocol", False) or isinstance(value, wanted)
        if get_origin(wanted) is dict:
            return isinstance(value, dict)
        return value is not None or wanted is Any or isinstance(wanted, str)
    return isinstance(value, plain[wanted]) and (wanted is bool or not isinstance(value, bool))


def said(wanted: Any) -> str:
    """An annotated type in words: `'a', 'b' or None`, `int`, `tuple[str, ...]`."""
    if get_origin(wanted) is Literal:
        words = [repr(choice) for choice in get_args(wanted)]
    elif get_origin(wanted) in (Union, UnionType):
        words = [said(part) for part in get_args(wanted)]
    elif get_origin(wanted) is Annotated:
        return said(get_args(wanted)[0])
    else:
        plain = isinstance(wanted, type) and not get_args(wanted)
        return "None" if wanted is NoneType else wanted.__name__ if plain else str(wanted)
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def check_kinds(part: Any) -> None:
    """Refuse fields of a dataclass that are of another kind than they are annotated with.

    Raises:
      ConfigError: naming the first, its value and what it may be.
    """
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if not fits(value, f.type):
            raise ConfigError(
                f"{type(part).__name__}.{f.name} is {value!r}; it must be {said(f.type)}."
            )
