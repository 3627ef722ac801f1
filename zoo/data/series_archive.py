"""Labelled series in the `.ts` files of the UEA and UCR archives (timeseriesclassification.com).

    folder = "JapaneseVowels/"
    train = LabelledSeries(folder + "JapaneseVowels_TRAIN.ts")
    test = LabelledSeries(folder + "JapaneseVowels_TEST.ts", fitted_on=train)

The package aeon carries eight of the sets: see `packaged_archive`.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.series import packaged


@dataclass(frozen=True)
class LabelledSeries:
    """Series with a class each: `series [length, variates]`, scaled, `mask [length]`, and `label`.

    Shorter series are followed by zeros, where the mask is False. Each variate is scaled by its
    mean and deviation over all steps of the training file.

    Attributes:
      path: the file.
      length: steps of an example, longer series are cut; None: of the longest one for training.
      fitted_on: the training file, whose scale, length and classes hold; None: this one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such file, has unequal variates, or a class the training file lacks.
    """

    path: str | Path
    length: int | None = None
    fitted_on: "LabelledSeries | None" = None

    @functools.cached_property
    def _rows(self) -> list[tuple[np.ndarray, str]]:
        """Raw series `[length, variates]` and the text of their class."""
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r} to read series from.")
        rows, within = [], False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if not within:
                within = line.lower() == "@data"
                continue
            *variates, label = line.split(":")
            try:
                values = [np.array(v.split(","), np.float64) for v in variates]
                rows.append((np.stack(values, 1), label))
            except ValueError as error:
                raise ValueError(
                    f"Line {number} of {str(path)!r} is not one series of numbers, its variates "
                    f"parted by colons and of one length, and a class: {error}."
                ) from None
        if not rows:
            raise ValueError(f"{str(path)!r} has no series after a line @data.")
        return rows

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of the training file, by number."""
        return (
            self.fitted_on.classes if self.fitted_on else tuple(sorted({c for _, c in self._rows}))
        )

    @functools.cached_property
    def longest(self) -> int:
        """Steps of the longest series of the training file."""
        return self.fitted_on.longest if self.fitted_on else max(len(x) for x, _ in self._rows)

    @functools.cached_property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each variate over the training file (1 where it is constant)."""
        if self.fitted_on:
            return self.fitted_on.scale
        steps = np.concatenate([x for x, _ in self._rows])
        deviation = steps.std(0)
        return steps.mean(0), np.where(deviation > 0, deviation, 1.0)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        series, name = self._rows[index]
        if name not in self.classes:
            raise ValueError(
                f"{str(self.path)!r} has a class {name!r}; the training file has "
                f"{', '.join(self.classes)}."
            )
        length = self.length or self.longest
        mean, deviation = self.scale
        scaled = ((series[:length] - mean) / deviation).astype(np.float32)
        padded = np.zeros((length, series.shape[1]), np.float32)
        padded[: len(scaled)] = scaled
        mask = np.arange(length) < len(scaled)
        return {"series": padded, "mask": mask, "label": self.classes.index(name)}


def packaged_archive(name: str) -> tuple[LabelledSeries, LabelledSeries]:
    """Training and test set of an archive's name from the package aeon, such as JapaneseVowels.

    Both have the length of the longest series of either, as in Time-Series-Library.

    Raises:
      FileNotFoundError: if it is not there, with the command that installs the package.
    """
    train, test = (
        packaged("aeon", "aeon==1.6.0", f"datasets/data/{name}/{name}_{part}.ts")
        for part in ("TRAIN", "TEST")
    )
    length = max(LabelledSeries(path).longest for path in (train, test))
    first = LabelledSeries(train, length)
    return first, LabelledSeries(test, length, fitted_on=first)
