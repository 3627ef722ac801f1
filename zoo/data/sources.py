"""Where examples come from: arrays, handwritten digits, prepared TFDS sets.

    data = Data(Arrays(image=images, label=labels), Arrays(image=others, label=their_labels))
    data = Data(Tfds("mnist"), Tfds("mnist", "test"))

A source is a frozen dataclass with `len` and indexing. An image example is
`{"image": uint8 [height, width, channels], "label": int}`.
"""

import contextlib
import functools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zoo.data.images import ImageFolder  # noqa: F401 (configs of older runs name it here)


@dataclass(frozen=True)
class Arrays:
    """Examples that are rows of arrays: `Arrays(image=images, label=labels)`.

    Raises:
      ValueError: if the arrays differ in length.
    """

    arrays: dict[str, np.ndarray] = field(repr=False)

    def __init__(self, **arrays: Any):
        object.__setattr__(self, "arrays", {k: np.asarray(v) for k, v in arrays.items()})
        lengths = {key: len(value) for key, value in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Arrays need one length, not {lengths or 'none at all'}.")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[index] for key, value in self.arrays.items()}

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all examples, if they have any."""
        return self.arrays.get("label")


@dataclass(frozen=True)
class Digits:
    """Handwritten digits of scikit-learn: 1,437 images to train on and 360 held out, 8x8, grey.

    The split is a fixed permutation. Pixels are scaled from 0..16 to 0..255.
    """

    split: str = "train"

    def __post_init__(self):
        if self.split not in ("train", "test"):
            raise ValueError(f"split={self.split!r} of the digits is neither 'train' nor 'test'.")

    def __len__(self) -> int:
        return len(self._rows[1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, labels = self._rows
        return {"image": images[index], "label": labels[index]}

    @functools.cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        order = order[:1437] if self.split == "train" else order[1437:]
        images = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
        return images[..., None], digits.target[order].astype(np.int32)


@dataclass(frozen=True)
class Tfds:
    """A prepared TFDS set, by `tfds.data_source`: random access, without TensorFlow.

    Attributes:
      name: e.g. `imagenet2012` or `mnist:3.0.1`.
      split: a split or a slice of one: `train`, `test[:10%]`.
      data_dir: where sets are prepared; None is the library's default.
      shapes: of the features to read (None: all). A config that gives them can be read, and
        planned (`zoo plan`), where the set is not: it is opened when the run begins.

    Raises:
      FileNotFoundError: if the set was not prepared for random access in `data_dir`.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    shapes: dict[str, tuple[int, ...]] | None = None

    def __post_init__(self):
        if self.shapes is None:
            self._rows  # noqa: B018 (fail here, not in a reader thread)

    def example(self) -> dict[str, Any]:
        """Zeros in the form of an example: images (three axes) are uint8, all else int32."""
        if self.shapes is None:
            return self[0]
        kinds = {3: np.uint8}
        return {k: np.zeros(s, kinds.get(len(s), np.int32)) for k, s in self.shapes.items()}

    @functools.cached_property
    def _rows(self) -> Any:
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise FileNotFoundError(
                f"The TFDS set {self.name!r} needs the package tensorflow_datasets: "
                "pip install tensorflow_datasets"
            ) from None
        try:
            return tfds.data_source(
                self.name, split=self.split, data_dir=self.data_dir, download=False
            )
        except ImportError as error:
            raise FileNotFoundError(
                f"The TFDS set {self.name!r} needs a package that is not installed ({error})."
            ) from None
        except tfds.core.DatasetNotFoundError:
            raise FileNotFoundError(
                f"TFDS knows no set {self.name!r}; tensorflow.org/datasets/catalog lists them."
            ) from None
        except Exception as error:  # the library raises many kinds, KeyError for an absent file
            raise FileNotFoundError(self._absent(error)) from None

    def _absent(self, error: Exception) -> str:
        """What to run, or which splits there are."""
        import tensorflow_datasets as tfds

        where = self.data_dir or "the default folder"
        with contextlib.suppress(Exception):
            about = tfds.builder(self.name, data_dir=self.data_dir)
            splits = sorted(about.info.splits)
            name = re.split(r"[\[+]", self.split)[0]
            if splits and name not in splits:
                return (
                    f"The TFDS set {self.name!r} has no split {self.split!r}; it has "
                    f"{', '.join(splits)}."
                )
        place = f" --data_dir={self.data_dir}" if self.data_dir else ""
        lines = str(error).strip().splitlines()
        reason = f" ({lines[0].rstrip('.')})" if lines and not isinstance(error, KeyError) else ""
        return (
            f"The TFDS set {self.name!r} is not prepared in {where}{reason}; run: tfds build "
            f"{self.name} --file_format=array_record{place} (pip install tensorflow first), and "
            "give that folder as data_dir if it is not the default."
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return {name: row[name] for name in self.shapes or row}
