"""A small FaViT learns scikit-learn's handwritten digits.

    python train.py configs/vision/favit_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 64x64: three stages of one
block. 224 steps, four minutes on two busy CPU cores; expected accuracy on the held-out images 94 %
(97.2 % measured).
"""

from zoo.recipes import digits
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return digits("favit_test", epochs=10, size=(64, 64), learning_rate=4e-3)
