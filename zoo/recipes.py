"""Configurations that several experiments share."""

from typing import Any

from zoo.data.digits import enlarged_digits
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig


def digits(
    model: str,
    epochs: int,
    size: tuple[int, int] = (32, 32),
    learning_rate: float = 2e-3,
    clip: float | None = None,
    **fields: Any,
) -> TrainConfig:
    """A classifier of scikit-learn's 1,437 handwritten digits, 64 at a time, by AdamW in one cycle.

    Args:
      model: name of a variant.
      epochs: how often each image is seen.
      size: height and width to which the images of 8x8 pixels are enlarged.
      learning_rate: the peak, after 30 % of the steps.
      clip: largest norm of a gradient; None: no limit.
      **fields: of the model, beside its single input channel.
    """
    steps = epochs * 1437 // 64
    return TrainConfig(
        model=Model(model, {"in_channels": 1, **fields}),
        task=Classification(),
        data=enlarged_digits(size, 64),
        optimizer=Optimizer(
            learning_rate=learning_rate,
            schedule="one_cycle",
            initial_fraction=0.04,
            weight_decay=0.05,
            clip=clip,
        ),
        checkpoint=Checkpointing(every=steps),
        num_steps=steps,
        eval_every=steps // 4,
        log_every=50,
    )
