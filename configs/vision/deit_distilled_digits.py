"""A small DeiT learns handwritten digits from labels and from the decisions of a trained teacher.

    python train.py configs/vision/cswin_digits.py --workdir runs/teacher
    python train.py configs/vision/deit_distilled_digits.py

The teacher is a CSWin; it stays as it is, and no gradient or moment is kept of it. 898 steps, about
two minutes on two CPU cores; expected accuracy on the held-out images 96 %.
"""

from zoo.data.digits import enlarged_digits
from zoo.tasks import Distillation
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

EPOCHS, BATCH, SIZE = 40, 64, (32, 32)
STEPS = EPOCHS * 1437 // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    student = {"image_size": SIZE, "patch_size": 4, "in_channels": 1, "distilled": True}
    return TrainConfig(
        model={
            "student": Model("vit_test", student),
            "teacher": Model("cswin_test", {"in_channels": 1}, checkpoint="runs/teacher"),
        },
        task=Distillation(kind="hard"),
        data=enlarged_digits(SIZE, BATCH),
        optimizer=Optimizer(
            learning_rate=4e-3, schedule="one_cycle", initial_fraction=0.04, weight_decay=0.05
        ),
        checkpoint=Checkpointing(every=STEPS),
        num_steps=STEPS,
        eval_every=STEPS // 4,
        log_every=50,
    )
