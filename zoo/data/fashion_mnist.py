"""Fashion-MNIST, read through a TFDS builder that needs neither a download nor TensorFlow.

The files come with Debian's package: `apt-get install dataset-fashion-mnist`.
"""

import functools
import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from zoo.data.sources import Tfds

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A gzipped IDX file of uint8 that must have `shape`, which its header says before it is read.

    Raises:
      ValueError: if it is another kind of file, or of another size.
    """
    size = int(np.prod(shape))
    with gzip.open(path, "rb") as file:
        try:
            zero, kind, ndim = struct.unpack(">HBB", file.read(4))
            dims = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            if (zero, kind, dims) != (0, 8, shape):
                raise ValueError(f"its header says type {kind} and shape {dims}")
            data = file.read(size + 1)
        except (OSError, EOFError, struct.error, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is not an IDX file of bytes of shape {shape}: {error}."
            ) from None
    if len(data) != size:
        raise ValueError(f"{str(path)!r} holds {len(data)} bytes in place of {size}.")
    return np.frombuffer(data, np.uint8).reshape(shape)


class FashionMnistIdx(tfds.core.GeneratorBasedBuilder):
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT) from the four IDX files in a folder."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: str = DEBIAN_FOLDER, **kwargs):
        self.source = source
        kwargs.setdefault("file_format", "array_record")  # tfds.data_source gives it too
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=LABELS),
                }
            ),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
        )

    def _split_generators(self, dl_manager):
        folder = Path(self.source)
        return {
            "train": self._generate_examples(folder, "train", 60_000),
            "test": self._generate_examples(folder, "t10k", 10_000),
        }

    def _generate_examples(self, folder: Path, prefix: str, count: int):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28))
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,))
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image[..., None], "label": int(label)}


@dataclass(frozen=True)
class FashionMnist:
    """60,000 (train) or 10,000 (test) grey images of clothes, 28x28, ten classes.

    The first use prepares the TFDS set from the files in `source`.

    Attributes:
      split: `train`, `test`, or a slice such as `train[:10%]`.
      source: folder of the four IDX files.
      data_dir: where TFDS keeps the prepared set; None is its default folder.

    Raises:
      FileNotFoundError: if the files are not there.
      ValueError: if they are not what they should be.
    """

    split: str = "train"
    source: str = DEBIAN_FOLDER
    data_dir: str | None = None

    def __post_init__(self):
        if not Path(self.source).is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.source!r} with the Fashion-MNIST files; on Debian "
                "`apt-get install dataset-fashion-mnist` makes it; else set source=."
            )
        FashionMnistIdx(source=self.source, data_dir=self.data_dir).download_and_prepare()

    @functools.cached_property
    def _rows(self) -> Tfds:
        return Tfds("fashion_mnist_idx", self.split, self.data_dir)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]
