"""A small SVT learns scikit-learn's handwritten digits.

    python train.py configs/vision/svt_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 32x32: one scattering and two
attention blocks. 336 steps, two minutes on two CPU cores; expected accuracy on the held-out images
98 % (99.4 % measured).
"""

from zoo.recipes import digits
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return digits("svt_test", epochs=15)
