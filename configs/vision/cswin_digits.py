"""A small CSWin learns scikit-learn's handwritten digits.

    python train.py configs/vision/cswin_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 32x32: four stages of one
block. 269 steps, a minute and a quarter on two busy CPU cores; expected accuracy on the held-out
images 98 % (98.9 % measured).
"""

from zoo.recipes import digits
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return digits("cswin_test", epochs=12)
