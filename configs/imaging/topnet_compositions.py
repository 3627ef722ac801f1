"""A small TopNet learns where on a photo, and how large, an object belongs.

    python train.py configs/imaging/topnet_compositions.py

Each photo has two plain squares, and the object belongs on the one of its colour: a network that
does not look at the object finds half of the boxes. Measured on a photo that training never had:
`top1` 67 %, `top5` 70 %, four minutes on a busy machine. See both in the table, and `placed.png` in
the run directory: photo, object, heat map, and the object where it was put.
"""

from zoo.data import Data
from zoo.data.compositions import Compositions
from zoo.evaluators import PlacedObjects
from zoo.tasks import ObjectPlacement
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS = 700


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model("topnet_tiny"),
        task=ObjectPlacement(),
        data=Data(
            train=Compositions(100_000),
            eval=Compositions(256, name="flower", split="test", seed=1),
            batch_size=32,
            eval_batch_size=64,
        ),
        optimizer=Optimizer(
            learning_rate=1e-3, schedule="one_cycle", initial_fraction=0.05, clip=1.0
        ),
        evaluators=(PlacedObjects(),),
        checkpoint=Checkpointing(metric="top1"),
        num_steps=STEPS,
        eval_every=STEPS,
        log_every=50,
    )
