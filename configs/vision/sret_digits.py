"""A small SReT learns scikit-learn's handwritten digits.

    python train.py configs/vision/sret_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 64x64: two stages of two blocks
in four runs. 269 steps, under five minutes on two busy CPU cores (two minutes of processor time);
expected accuracy on the held-out images 97 % (99.2 % measured; the authors' code, at this rate and
length: 98.6 %).
"""

from zoo.recipes import digits
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return digits("sret_test", epochs=12, size=(64, 64))
