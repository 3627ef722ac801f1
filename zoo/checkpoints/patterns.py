"""Name patterns of checkpoint rules: text with numbered places.

`layers.{s}.blocks.{b}.attn.qkv.weight` matches `layers.0.blocks.11.attn.qkv.weight` with
`{"s": 0, "b": 11}`, and is formatted back from them. `{s+1}`, `{2*s}` and `{2*s+1}` stand for
numbers computed from `s`, for files that count in another way. A filter may hold `*`, which matches
any text.
"""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

_PLACE = re.compile(r"\{(?:(\d+)\*)?([A-Za-z_]\w*)(?:([+-]\d+))?\}")


class _Place(NamedTuple):
    factor: int
    name: str
    offset: int


class Pattern:
    """A compiled pattern. Use `compile_pattern`, which remembers them.

    Attributes:
      text: as written.
      names: the index names in it.
      wild: whether it holds `*`, so that it can only match and not be formatted.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.wild = "*" in _PLACE.sub("", text)
        self._parts: list[str | _Place] = []
        start = 0
        for found in _PLACE.finditer(text):
            literal = text[start : found.start()]
            place = _Place(int(found[1] or 1), found[2], int(found[3] or 0))
            if not place.factor:
                raise ValueError(f"Pattern {text!r} multiplies an index by zero.")
            self._parts += [literal, place]
            start = found.end()
        self._parts.append(text[start:])
        if any("{" in p or "}" in p for p in self._parts if isinstance(p, str)):
            raise ValueError(
                f"Pattern {text!r} has a brace that is no index; write {{i}}, {{i+1}} or {{2*i+1}}."
            )
        self._places = [p for p in self._parts if isinstance(p, _Place)]
        self.names = frozenset(p.name for p in self._places)

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        """Compiled when first used: thousands of rules are imported that nobody asks."""
        return re.compile(
            "".join(
                _escape(part) if isinstance(part, str) else "(0|[1-9][0-9]*)"
                for part in self._parts
            )
        )

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    @property
    def prefix(self) -> str:
        """The text up to and including the last index (all of it if there is none)."""
        last = self.text.rfind("}")
        return self.text[: last + 1] if last >= 0 else self.text

    def match(self, name: str) -> dict[str, int] | None:
        """The indices under which this pattern is `name`, or None."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        indices: dict[str, int] = {}
        for place, digits in zip(self._places, found.groups(), strict=True):
            value, rest = divmod(int(digits) - place.offset, place.factor)
            if rest or value < 0 or indices.setdefault(place.name, value) != value:
                return None
        return indices

    def format(self, indices: Mapping[str, int]) -> str:
        """The name for these indices."""
        if self.wild:
            raise ValueError(f"Pattern {self.text!r} has a wildcard: it only filters names.")
        return "".join(
            part if isinstance(part, str) else str(part.factor * indices[part.name] + part.offset)
            for part in self._parts
        )


def _escape(literal: str) -> str:
    return ".*".join(re.escape(piece) for piece in literal.split("*"))


@functools.cache
def compile_pattern(text: str) -> Pattern:
    """The compiled pattern of `text`.

    Raises:
      ValueError: for a brace that is no index.
    """
    return Pattern(text)
