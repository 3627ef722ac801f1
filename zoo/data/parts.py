"""Two sources out of one, and what labels say: how many of each class, and weights for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Part:
    """The training or the held-out part of a source, drawn by a seed from each class alike.

    Attributes:
      source: of all examples.
      which: `train`, or `held_out`.
      share: of the examples of each class that is held out; of a class of two or more at least one.
      seed: of the draw.

    Raises:
      ValueError: if the share is not between 0 and 1, or leaves a part empty.
    """

    source: Any
    which: Literal["train", "held_out"] = "train"
    share: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share} of the examples; give a number between 0 and 1.")
        if not len(self._places):
            raise ValueError(
                f"{len(self.source)} examples are too few to hold out {self.share:g} of them."
            )

    @cached_property
    def _places(self) -> np.ndarray:
        """Numbers of the examples of this part, in order."""
        labels = labels_of(self.source)
        labels = np.zeros(len(self.source), int) if labels is None else np.asarray(labels)
        rng, held_out = np.random.default_rng(self.seed), []
        for label in np.unique(labels):
            places = rng.permutation(np.flatnonzero(labels == label))
            count = max(round(self.share * len(places)), min(1, len(places) - 1))
            held_out.append(places[:count])
        chosen = np.zeros(len(labels), bool)
        chosen[np.concatenate(held_out)] = True
        return np.flatnonzero(chosen if self.which == "held_out" else ~chosen)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, where the source has them."""
        return getattr(self.source, "classes", None)

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of the examples, where the source tells them without reading examples."""
        labels = labels_of(self.source)
        return None if labels is None else np.asarray(labels)[self._places]

    def check(self) -> None:
        """As the source checks its files."""
        if hasattr(self.source, "check"):
            self.source.check()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self._places[index])]


def split(source: Any, share: float = 0.2, seed: int = 0) -> tuple[Part, Part]:
    """A source as a training and a held-out part that have no example in common; see `Part`."""
    return Part(source, "train", share, seed), Part(source, "held_out", share, seed)


def labels_of(source: Any) -> np.ndarray | None:
    """The labels of all examples of a source, if it tells them without reading examples."""
    return getattr(source, "labels", None)


def class_weights(source: Any) -> tuple[float, ...]:
    """A weight for each class, so that all classes together count alike: `n / (classes * n_c)`.

    For `zoo.tasks.Classification(class_weights=...)`. A class without examples has the weight 0.

    Raises:
      ValueError: if the source does not tell its labels, or they are no class numbers.
    """
    labels = labels_of(source)
    if labels is None or np.asarray(labels).dtype.kind not in "iu" or np.ndim(labels) != 1:
        raise ValueError(f"{type(source).__name__} does not tell its labels as class numbers.")
    names: Sequence[str] = getattr(source, "classes", None) or ()
    counts = np.bincount(labels, minlength=len(names))
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return tuple(float(w) for w in weights)


def facts(source: Any) -> dict[str, Any]:
    """What answers need of a training source: names of classes or variates, and their scale."""
    source = getattr(source, "source", source) if hasattr(source, "share") else source
    found: dict[str, Any] = {}
    try:
        classes = getattr(source, "classes", None)
        table = getattr(source, "table", None)
        if classes:
            found["classes"] = [str(name) for name in classes]
        if table is not None and hasattr(table, "variates"):
            mean, deviation = (getattr(source, "fitted_on", None) or table).scale
            found["variates"] = list(table.variates)
            found["scale"] = {"mean": mean.tolist(), "deviation": deviation.tolist()}
    except (OSError, ValueError, AttributeError):
        return {}
    return found
