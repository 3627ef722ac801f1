"""A small FMViT (reconstructed) learns scikit-learn's handwritten digits.

    python train.py configs/vision/fmvit_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 32x32: 121,000
parameters. 269 steps, two minutes on two CPU cores; expected accuracy on the held-out images 97 %
(98.9 % measured).
"""

from zoo.recipes import digits
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return digits("fmvit_test", epochs=12, depths=(1, 1))
