"""Which leaf of a saved step becomes which leaf of a run that goes on with other settings.

The state's parts are keyed by name, so most changes of a config keep most leaves:

    another clip, decay or schedule      the moments are taken as they are
    another rule                         its moments begin afresh
    a running mean from now on           it begins as the parameters are
    other leaves frozen or trained       parameters go from one part to the other

What a run needs in any case, and finds nowhere, is refused by the caller: the parameters and other
collections of the networks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ELSEWHERE = {
    "params": ("frozen",),
    "frozen": ("params",),
    "ema": ("params", "frozen"),
}
"""Part -> other parts of a saved step in which its leaf may be."""

AFRESH = ("optimizer", "carry", "ema")
"""Parts whose leaves may begin afresh."""


@dataclass(frozen=True)
class Match:
    """How a saved step serves a run.

    Attributes:
      source: path of each leaf that is wanted and found -> its path in the step.
      afresh: paths that are wanted, not in the step, and may begin afresh.
      unused: paths of the optimizer, the running mean and the carry that nothing wants.
    """

    source: Mapping[str, str]
    afresh: tuple[str, ...]
    unused: tuple[str, ...]

    def sentence(self) -> str:
        """What the user should know, or an empty text."""
        said = []
        if self.afresh:
            said.append(f"{_some(self.afresh)} is not in the checkpoint and begins afresh")
        if self.unused:
            said.append(f"{_some(self.unused)} of the checkpoint is not used any more")
        return "; ".join(said) + "." if said else ""


def match(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Match:
    """Where the wanted leaves are in a saved step.

    Args:
      saved: path -> what has `shape` (or the key), of the step's manifest.
      wanted: path -> `jax.ShapeDtypeStruct`.
    """
    source, afresh = {}, []
    for path, leaf in wanted.items():
        part, _, rest = path.partition("/")
        places = [path, *(f"{other}/{rest}" for other in ELSEWHERE.get(part, ()))]
        fits = part not in AFRESH  # a wrong shape of a parameter is refused, not replaced
        found = next(
            (p for p in places if p in saved and (fits or _shape(saved[p]) == tuple(leaf.shape))),
            None,
        )
        if found is not None:
            source[path] = found
        elif part in AFRESH:
            afresh.append(path)
        else:
            source[path] = path  # missing: the caller says so
    used = set(source.values())
    unused = tuple(p for p in saved if p not in used and p.partition("/")[0] in AFRESH)
    return Match(source, tuple(afresh), unused)


def _shape(leaf: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(leaf["shape"])


def _some(paths: tuple[str, ...]) -> str:
    """Parts and their first names, with a count."""
    heads = list(dict.fromkeys("/".join(path.split("/")[:3]) for path in paths))
    return ", ".join(heads[:3]) + (f" and {len(heads) - 3} more" if len(heads) > 3 else "")
