"""A small DiNAT learns scikit-learn's handwritten digits.

    python train.py configs/vision/dinat_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 32x32. 449 steps, a
minute on two CPU cores; expected accuracy on the held-out images 97 % (97.5 % measured; the
authors' code with this recipe: 97.2 %).
"""

from zoo.recipes import digits
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return digits("dinat_test", epochs=20, learning_rate=4e-3, clip=1.0)
