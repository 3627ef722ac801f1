"""Examples, transforms and batches."""

from zoo.data.loader import Data, Source, eval_batches, example_batch, train_iterator
from zoo.data.sources import Arrays, Digits, ImageFolder, Tfds

__all__ = [
    "Arrays",
    "Data",
    "Digits",
    "ImageFolder",
    "Source",
    "Tfds",
    "eval_batches",
    "example_batch",
    "train_iterator",
]
