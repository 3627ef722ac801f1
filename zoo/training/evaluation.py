"""Measuring what a run learnt, or what a published checkpoint knows, on a config's data."""

import dataclasses
import os
import tempfile
from pathlib import Path

import jax

from zoo.checkpoints.runs import load_run, run_folder, saved_extra
from zoo.errors import ConfigError, PartitionError
from zoo.training import config as configs
from zoo.training.config import Model, Partition, TrainConfig
from zoo.training.partition import make_mesh
from zoo.training.program import Program, build_networks
from zoo.training.start import first_variables, placed


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
        extra = saved_extra(source, step)
        config = configs.from_json(extra["config"]) if config is None else config
        program = _program(config)
        variables, extra = load_run(source, step=step, sharding=program.sharding)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from None
    folder = run_folder(source) / "evaluation" / str(extra["step"])
    return _evaluate(program, placed(program, variables), folder), extra["step"]


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
    if not isinstance(config.model, Model):
        raise ConfigError(
            "A published checkpoint is of one network; this config has "
            f"{', '.join(config.model)}. Set the checkpoint of each in the config."
        )
    model = dataclasses.replace(config.model, checkpoint=os.fspath(checkpoint), adapt=adapt)
    program = _program(dataclasses.replace(config, model=model))
    with tempfile.TemporaryDirectory() as folder:
        return _evaluate(program, first_variables(program), Path(folder))


def _program(config: TrainConfig) -> Program:
    """The program of a config on the devices here: its own mesh if it fits them."""
    build_networks(config)  # before any device is asked, so that a wrong name is said first
    own = dataclasses.replace(config.partition, mode="sharding", remat=None, offload="none")
    try:
        mesh = make_mesh(own, jax.devices())
    except PartitionError:
        own = Partition()
        mesh = make_mesh(own, jax.devices())
    return Program(dataclasses.replace(config, partition=own), mesh)


def _evaluate(program: Program, variables: dict, folder: Path) -> dict[str, float]:
    """The task's metrics, then what the evaluators of the config say."""
    with program.context():
        found = program.evaluate(variables)
        for evaluator in program.config.evaluators:
            folder.mkdir(parents=True, exist_ok=True)
            found |= evaluator.run(program, variables, program.config.data, folder)
    return found
