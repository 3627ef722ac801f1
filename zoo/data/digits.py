"""Scikit-learn's digits as the small experiments of vision take them."""

from zoo.data.loader import Data
from zoo.data.sources import Digits
from zoo.data.transforms import Normalize, Resize


def enlarged_digits(size: tuple[int, int], batch_size: int) -> Data:
    """The 1,437 digits to learn from and the 360 held out, enlarged bilinearly, from -1 to 1.

    Args:
      size: height and width in pixels; originals have 8x8.
      batch_size: of training; evaluation takes 120 at a time.
    """
    transforms = (Resize(size, "bilinear"), Normalize((0.5,), (0.5,)))
    return Data(
        train=Digits("train"),
        eval=Digits("test"),
        train_transforms=transforms,
        eval_transforms=transforms,
        batch_size=batch_size,
        eval_batch_size=120,
    )
