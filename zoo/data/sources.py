"""Where examples come from: arrays, folders of images, prepared TFDS sets.

A source is a frozen dataclass with `len` and indexing. An image example is
`{"image": uint8 [height, width, channels], "label": int}`.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


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
class ImageFolder:
    """A folder with one folder of image files per class; classes are numbered by sorted name.

    Files are decoded when they are read, to RGB.

    Raises:
      FileNotFoundError: if there is no such folder, or no image in a folder of it.
    """

    path: str | Path

    def __post_init__(self):
        root = Path(self.path)
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {str(root)!r} to read images from.")
        if not self.files:
            raise FileNotFoundError(
                f"{str(root)!r} holds no images; expected one folder per class with files that end "
                f"in {', '.join(IMAGE_SUFFIXES)}."
            )

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        return tuple(sorted(p.name for p in Path(self.path).iterdir() if p.is_dir()))

    @functools.cached_property
    def files(self) -> tuple[tuple[Path, int], ...]:
        """All files with the number of their class."""
        return tuple(
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((Path(self.path) / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image, UnidentifiedImageError

        file, label = self.files[index]
        try:
            with Image.open(file) as image:
                return {"image": np.asarray(image.convert("RGB")), "label": label}
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{str(file)!r} is not a readable image: {error}.") from None


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
        import tensorflow_datasets as tfds

        try:
            return tfds.data_source(
                self.name, split=self.split, data_dir=self.data_dir, download=False
            )
        except (
            AssertionError,
            FileNotFoundError,
            NotImplementedError,
            ValueError,
            tfds.core.DatasetNotFoundError,
        ) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise FileNotFoundError(
                f"The TFDS set {self.name!r} (split {self.split!r}) cannot be read from "
                f"{self.data_dir or 'the default folder'}: {first} Prepare it with "
                "`tfds build --file_format=array_record`, which random access needs."
            ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return {name: row[name] for name in self.shapes or row}
