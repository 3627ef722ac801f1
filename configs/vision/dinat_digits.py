"""A small DiNAT learns scikit-learn's handwritten digits.

    python train.py configs/vision/dinat_digits.py

1,437 images to learn from and 360 held out, 8x8 pixels, enlarged to 32x32. 449 steps, a
minute on two CPU cores; expected accuracy on the held-out images 97 % (97.5 % measured; the
authors' code with this recipe: 97.2 %).
"""

from zoo.data.digits import enlarged_digits
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

EPOCHS, BATCH, SIZE = 20, 64, (32, 32)
STEPS = EPOCHS * 1437 // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model("dinat_test", {"in_channels": 1}),
        task=Classification(),
        data=enlarged_digits(SIZE, BATCH),
        optimizer=Optimizer(
            learning_rate=4e-3,
            schedule="one_cycle",
            initial_fraction=0.04,
            weight_decay=0.05,
            clip=1.0,
        ),
        checkpoint=Checkpointing(every=STEPS),
        num_steps=STEPS,
        eval_every=STEPS // 4,
        log_every=50,
    )
