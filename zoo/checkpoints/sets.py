"""Several sets of weights in one file: which there are, and which one is taken."""

import re
from collections.abc import Mapping

SETS = {
    "averaged": r"(.*[._/])?g?ema(_.*|[._/].*)?|.*(averag|shadow|_ema|swa_model).*",
    "teacher": r".*(teacher|momentum_encoder|target_(encoder|network|model)|encoder_k\b).*",
    "student": r".*(student|online_(encoder|network|model)).*",
    "raw": r".*",
}
"""Kinds of weights that one file may hold several of -> expression of the entries' names."""

PREFERRED = ("averaged", "raw", "teacher", "student")
"""Which kind is taken without a choice: what the published evaluations take. timm and BasicSR take
the averaged weights, DINO's and its kin's take the teacher's rather than the student's."""


def kind_of(name: str) -> str:
    """Which of `SETS` an entry or a prefix is by its name."""
    return next(kind for kind, text in SETS.items() if re.fullmatch(text, name.lower(), re.DOTALL))


def choose_set(kinds: Mapping[str, str], weights: str | None, where: str = "The file") -> str:
    """The entry to take among several sets of weights.

    Args:
      kinds: entry -> its kind, in order of preference within a kind.
      weights: a kind or an entry; None takes the first of `PREFERRED`.
      where: the file, for the error.

    Raises:
      ValueError: if there is no such set.
    """
    if weights is None:
        return min(kinds, key=lambda entry: PREFERRED.index(kinds[entry]))
    wanted = weights.rstrip("./")
    for entry, kind in kinds.items():
        if wanted in (entry, entry.rstrip("./"), kind):
            return entry
    alike = [e for e in kinds if wanted in e] if wanted not in SETS else []
    alike += [e for e, kind in kinds.items() if (wanted, kind) == ("raw", "student")]
    if alike:
        return alike[0]
    raise ValueError(f"{where} holds no weights {weights!r}; it holds {_listed(kinds)}.")


def set_note(kinds: Mapping[str, str], chosen: str, where: str = "The file") -> str:
    """The sentence that says which of several sets is taken."""
    return (
        f"{where} holds several sets of weights: {_listed(kinds)}. The {kinds[chosen]} ones "
        f"({chosen or 'no prefix'}) are taken; weights={_other(kinds, chosen)!r} takes others."
    )


def _other(kinds: Mapping[str, str], chosen: str) -> str:
    other = next(entry for entry in kinds if entry != chosen)
    return kinds[other] if kinds[other] != kinds[chosen] else other


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} ({entry or 'no prefix'})" for entry, kind in kinds.items())
