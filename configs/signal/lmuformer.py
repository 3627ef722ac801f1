"""A small LMUFormer reads handwritten digits pixel by pixel, in a random order.

    python train.py configs/signal/lmuformer.py

1,437 of scikit-learn's digits to learn from and 360 held out; 64 pixels one after another, in one
order for all (as permuted sequential MNIST), so that only a long memory helps. 898 steps, two
minutes on two CPU cores; expected accuracy on the held-out images 98 % (98.3 % measured).
"""

from zoo.data import Data, Digits
from zoo.data.transforms import PixelSeries
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

EPOCHS, BATCH, PIXELS = 40, 64, 64
STEPS = EPOCHS * 1437 // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model(
            "lmuformer_test",
            {
                "context_length": PIXELS,
                "theta": float(PIXELS),
                "variates": 1,
                "num_classes": 10,
                "embed_dim": 48,
            },
        ),
        task=Classification(),
        data=Data(
            train=Digits("train"),
            eval=Digits("test"),
            train_transforms=(PixelSeries(seed=0),),
            eval_transforms=(PixelSeries(seed=0),),
            batch_size=BATCH,
            eval_batch_size=120,
        ),
        optimizer=Optimizer(
            learning_rate=3e-3, schedule="one_cycle", initial_fraction=0.04, weight_decay=0.01
        ),
        checkpoint=Checkpointing(every=STEPS),
        num_steps=STEPS,
        eval_every=STEPS // 4,
        log_every=50,
    )
