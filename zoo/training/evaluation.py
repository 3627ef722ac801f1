"""Measuring what a run learnt, or what a published checkpoint knows, on a config's data."""

import dataclasses
import os
from pathlib import Path

import jax

import zoo
from zoo.checkpoints.runs import load_run
from zoo.errors import ConfigError
from zoo.training import config as configs
from zoo.training.config import Partition, TrainConfig
from zoo.training.partition import make_mesh
from zoo.training.program import Program, build_model


def evaluate_run(
    source: str | os.PathLike, step: int | None = None, config: TrainConfig | None = None
) -> tuple[dict[str, float], int]:
    """Metrics of a run's checkpoint on its held-out examples, and the checkpoint's step.

    Args:
      source: a run directory, or one step in its `checkpoints`.
      step: which step; None is the newest that is whole.
      config: in place of the one that the checkpoint holds.

    Raises:
      ConfigError: if there is no checkpoint or it does not fit.
      CheckpointBroken: if it is not what was saved.
    """
    try:
        variables, extra = load_run(source, step=step)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from None
    config = configs.from_json(extra["config"]) if config is None else config
    return _evaluate(config, variables), extra["step"]


def evaluate_checkpoint(
    config: TrainConfig, checkpoint: str | os.PathLike, adapt: bool = False
) -> dict[str, float]:
    """Metrics of a published checkpoint on the held-out examples of a config.

    Args:
      config: names the model (a variant of the zoo), the data and the task.
      checkpoint: an official file, as `zoo.load` takes it.
      adapt: as in `zoo.load`.

    Raises:
      ConfigError: if the file is not there or does not fit.
    """
    try:
        name, overrides = config.model.name, config.model.overrides
        _, variables = zoo.load(name, Path(checkpoint), adapt=adapt, **overrides)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from None
    return _evaluate(config, variables)


def _evaluate(config: TrainConfig, variables: dict) -> dict[str, float]:
    """On all devices, whatever mesh the run was trained on."""
    build_model(config.model)  # before any device is asked, so that a wrong name is said first
    config = dataclasses.replace(config, partition=Partition())
    program = Program(config, make_mesh(config.partition, jax.devices()))
    with program.context():
        return program.evaluate(program.put(variables))
