"""Examples, transforms and batches."""

from zoo.data.images import ImageFolder
from zoo.data.loader import Data, Source, eval_batches, example_batch, train_iterator
from zoo.data.parts import Part, class_weights, split
from zoo.data.sources import Arrays, Digits, Tfds

__all__ = [
    "Arrays",
    "Data",
    "Digits",
    "ImageFolder",
    "Part",
    "Source",
    "Tfds",
    "class_weights",
    "eval_batches",
    "example_batch",
    "split",
    "train_iterator",
]
