"""The collectives of a step, those that are alike together."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from zoo.planning import hlo


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step that are alike.

    Attributes:
      kind: as in HLO.
      what: `parameters` (their gradients included), `activations` or `scalars`.
      shapes: of one of them, as text.
      count: how many run in a step.
      bytes: of all of them, at one chip.
      group: chips that take part together.
      known: False where a loop's length is not known: then these are figures of one iteration.
      source: the operation of the model that the first of them serves.
    """

    kind: str
    what: str
    shapes: str
    count: int
    bytes: int
    group: int
    known: bool
    source: str


def grouped(collectives: Iterable[hlo.Collective]) -> list[Traffic]:
    """Collectives of one kind and shape together, largest first.

    One that moves parameters and activations at once stands in two rows.
    """
    groups: dict[tuple, list] = defaultdict(list)
    for c in collectives:
        parts: dict[str, list] = defaultdict(list)
        for shape, of_parameters in zip(c.shapes, c.of_parameters, strict=True):
            what = "parameters" if of_parameters else "activations"
            parts[what if math.prod(shape[1]) > 1 else "scalars"].append(shape)
        for what, shapes in parts.items():
            groups[c.kind, what, tuple(shapes), c.group, c.known].append(c)
    rows = []
    for (kind, what, shapes, group, known), members in groups.items():
        text = [f"{t}[{','.join(map(str, dims))}]" for t, dims in shapes]
        more = f" and {len(text) - 2} more" if len(text) > 2 else ""
        rows.append(
            Traffic(
                kind,
                what,
                " ".join(text[:2]) + more,
                sum(c.times for c in members),
                round(sum(c.times * hlo.size((*s, 0)) for c in members for s in shapes)),
                group,
                known,
                members[0].source,
            )
        )
    return sorted(rows, key=lambda row: -row.bytes)
