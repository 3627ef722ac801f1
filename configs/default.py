"""A small Swin Transformer learns scikit-learn's handwritten digits.

    python train.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 16x16 and shifted by up to a
pixel. About two minutes on two CPU cores; expected accuracy on the held-out images 98 %.
"""

from zoo.data import Data, Digits
from zoo.data.transforms import Normalize, RandomCrop, Resize
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

EPOCHS, BATCH = 45, 64
STEPS = EPOCHS * 1437 // BATCH
SIZE = (16, 16)


def get_config() -> TrainConfig:
    """The configuration."""
    enlarge, scale = Resize(SIZE, "bilinear"), Normalize((0.5,), (0.5,))
    return TrainConfig(
        model=Model(
            "swin_test",
            {"image_size": SIZE, "in_channels": 1, "embed_dim": 48, "num_heads": (3, 6)},
        ),
        task=Classification(label_smoothing=0.1),
        data=Data(
            train=Digits("train"),
            eval=Digits("test"),
            train_transforms=(enlarge, RandomCrop(SIZE, 1), scale),
            eval_transforms=(enlarge, scale),
            batch_size=BATCH,
            eval_batch_size=120,
        ),
        optimizer=Optimizer(
            learning_rate=4e-3,
            schedule="one_cycle",
            initial_fraction=0.04,
            weight_decay=0.05,
            clip=1.0,
        ),
        checkpoint=Checkpointing(every=STEPS // 5),
        num_steps=STEPS,
        eval_every=STEPS // 5,
        log_every=20,
    )
