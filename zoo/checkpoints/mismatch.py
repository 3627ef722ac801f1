"""What to say when a checkpoint does not fit a model: everything at once, grouped and readable."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SHOWN = 8  # groups listed per kind; the attributes of the error hold all


class Misfit(NamedTuple):
    """A tensor of the wrong shape (or kind of number): official name, what it has, what we want."""

    name: str
    has: str
    wants: str


class CheckpointMismatch(ValueError):
    """A checkpoint's tensors are not those of the model.

    Attributes:
      missing: official names of tensors that the model needs and the file lacks.
      unexpected: names in the file that the model has no use for.
      misshapen: tensors of another shape than the model's (`Misfit`).
      settings: fields of the model with which all of the file fits, where they were found.
    """

    def __init__(
        self,
        headline: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[Misfit] = (),
        hint: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = dict(settings or {})
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshapen = tuple(misshapen)
        lines = [headline]
        if missing:
            lines.append(f"Missing ({len(missing)}): {listed(grouped(missing))}.")
        if unexpected:
            named = [
                text + _closest(first, missing) for text, first in _groups_with_first(unexpected)
            ]
            lines.append(f"Unexpected ({len(unexpected)}): {listed(named)}.")
        if misshapen:
            by_name = {m.name: m for m in misshapen}
            named = [
                f"{text} has {by_name[first].has}, wants {by_name[first].wants}"
                for text, first in _groups_with_first([m.name for m in misshapen])
            ]
            lines.append(f"Misshapen ({len(misshapen)}): {listed(named)}.")
        if hint:
            lines.append(hint)
        super().__init__("\n  ".join(lines))


def _groups_with_first(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names that differ in numbers only, as one text each, with the first name of each group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [
        (members[0] if len(members) == 1 else f"{stem} ({_span(members)})", members[0])
        for stem, members in groups.items()
    ]


def _span(names: Sequence[str]) -> str:
    """How many names of a group there are, and the first and last of their numbers."""
    numbers = sorted([int(n[:18]) for n in re.findall(r"\d+", name)] for name in names)
    first, last = (".".join(map(str, n)) for n in (numbers[0], numbers[-1]))
    return f"{len(names)} tensors, {first} to {last}"


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one text each."""
    return [text for text, _ in _groups_with_first(names)]


def listed(items: Sequence[str]) -> str:
    """The first `SHOWN` items and how many there are more."""
    more = f", and {len(items) - SHOWN} more groups" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known[:2000], n=1, cutoff=0.75)
    return f" (closest missing: {close[0]})" if close else ""
