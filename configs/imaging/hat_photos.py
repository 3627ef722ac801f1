"""A small HAT doubles a photo that it has not seen, better than bicubic enlargement.

    python train.py configs/imaging/hat_photos.py

Patches of 16x16 pixels of scikit-learn's photo `china` to learn from, of `flower` held out. See
`psnr` beside `bicubic_psnr` in the table, and `restored.png` in the run directory.
"""

from zoo.data import Data
from zoo.data.photos import PhotoPatches
from zoo.evaluators import RestoredImages
from zoo.tasks import ImageRestoration
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS = 400


def get_config() -> TrainConfig:
    """The configuration."""
    fields = {"image_size": (16, 16), "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2),
              "window_size": 8, "compress_ratio": 3, "squeeze_factor": 6}  # fmt: skip
    return TrainConfig(
        model=Model("hat_test", fields),
        task=ImageRestoration(crop=2),
        data=Data(
            train=PhotoPatches(20_000),
            eval=PhotoPatches(192, "flower", seed=1, turn=False),
            batch_size=16,
            eval_batch_size=64,
        ),
        optimizer=Optimizer(
            name="adam", learning_rate=2e-3, schedule="one_cycle", initial_fraction=0.05, clip=1.0
        ),
        evaluators=(RestoredImages(),),
        checkpoint=Checkpointing(metric="psnr"),
        num_steps=STEPS,
        eval_every=STEPS,
        log_every=20,
    )
