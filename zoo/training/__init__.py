"""The trainer: a configuration in, a run directory out.

    from zoo.training import train
    result = train(config, "runs/first")

`train.py` does the same from the command line.
"""

from zoo.errors import (
    CheckpointBroken,
    ConfigError,
    NonFiniteError,
    PartitionError,
    StorageError,
    TrainingError,
)
from zoo.training.config import (
    Checkpointing,
    Model,
    Optimizer,
    Partition,
    TrainConfig,
)
from zoo.training.loop import EXIT_STOPPED, Result, Stopped, train

__all__ = [
    "EXIT_STOPPED",
    "CheckpointBroken",
    "Checkpointing",
    "ConfigError",
    "Model",
    "NonFiniteError",
    "Optimizer",
    "Partition",
    "PartitionError",
    "Result",
    "Stopped",
    "StorageError",
    "TrainConfig",
    "TrainingError",
    "train",
]
