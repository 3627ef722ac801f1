"""A small T2T-ViT learns scikit-learn's handwritten digits.

    python train.py configs/vision/t2t_vit_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 64x64. 561 steps,
a minute on two CPU cores; expected accuracy on the held-out images 97 % (97.8 % measured; the
authors' code with this recipe: 97.2 %).
"""

from zoo.recipes import digits
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return digits("t2t_vit_test", epochs=25, size=(64, 64))
