"""The tiny config with examples enough that no epoch ends: also a config file for train.py."""

import dataclasses

from training import tiny

from zoo.training import Checkpointing, TrainConfig


def get_config() -> TrainConfig:
    config = tiny.get_config()
    data = dataclasses.replace(config.data, train=tiny.Blobs(size=1000))
    return dataclasses.replace(config, data=data, checkpoint=Checkpointing(every=4, keep=20))
