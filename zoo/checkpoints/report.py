"""What was done with a file's tensors, for the person who loads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zoo.checkpoints.mismatch import grouped, listed
from zoo.system import Preprocessing


@dataclass(frozen=True)
class Report:
    """How a file became a model's variables. `str(report)` is a sentence for each thing to know.

    Attributes:
      layout: the naming that the file has, or "" for a run of the trainer.
      prefix: what was stripped of the names.
      aside: names of the file that were left aside.
      fresh: leaves of the model that begin afresh.
      resized: leaf -> its shape in the file and in the model.
      dropped: names of the file that this model has no place for.
      notes: which set of weights was taken, which settings were read.
      preprocessing: of images, if the file's folder says it.
    """

    layout: str = ""
    prefix: str = ""
    aside: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __str__(self) -> str:
        lines = list(self.notes)
        if self.prefix:
            lines.append(f"The prefix {self.prefix!r} was stripped of the file's names.")
        if self.aside:
            lines.append(f"Left aside ({len(self.aside)}): {_some(self.aside)}.")
        if self.fresh:
            lines.append(f"Fresh, not from the file ({len(self.fresh)}): {_some(self.fresh)}.")
        if self.resized:
            sizes = [f"{p} from {old} to {new}" for p, (old, new) in self.resized.items()]
            lines.append(f"Resized ({len(sizes)}): {listed(sizes)}.")
        if self.dropped:
            lines.append(f"Dropped from the file ({len(self.dropped)}): {_some(self.dropped)}.")
        return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return listed(grouped(names))
