"""Measuring what a run learnt, or what a published checkpoint knows, on a config's data."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from zoo.checkpoints.runs import is_run, load_run, run_folder, saved_extra
from zoo.errors import ConfigError, PartitionError
from zoo.training import config as configs
from zoo.training.checks import check_platform, fitting, reading
from zoo.training.config import Model, Partition, TrainConfig
from zoo.training.fields import with_field
from zoo.training.partition import make_mesh
from zoo.training.program import Program, build_networks
from zoo.training.start import first_variables, placed


def evaluate_run(
    source: str | os.PathLike,
    step: int | None = None,
    config: TrainConfig | None = None,
    changes: Mapping[str, str] | None = None,
) -> tuple[dict[str, float], int]:
    """Metrics of a run's checkpoint on its held-out examples, and the checkpoint's step.

    All that training reported at its end: metrics, evaluators, and those of `data.test` as
    `test/...`.

    Args:
      source: a run directory, or one step in its `checkpoints`.
      step: which step; None is the newest that is whole.
      config: in place of the one that the checkpoint holds.
      changes: fields of that config to set, as `data.eval.split` -> "val".

    Raises:
      ConfigError: if there is no checkpoint or it does not fit.
      DataError: if an example cannot be read or does not fit.
      CheckpointBroken: if it is not what was saved.
    """
    program, variables, extra = open_run(source, step, config, changes)
    folder = run_folder(source) / "evaluation" / str(extra["step"])
    return _evaluate(program, variables, folder), extra["step"]


def open_run(
    source: str | os.PathLike,
    step: int | None = None,
    config: TrainConfig | None = None,
    changes: Mapping[str, str] | None = None,
) -> tuple[Program, dict[str, Any], dict[str, Any]]:
    """The program of a run on the devices here, its variables, and what was saved with them.

    Args:
      source: a run directory, or one step in its `checkpoints`.
      step: which step; None is the newest that is whole.
      config: in place of the one that the checkpoint holds.
      changes: fields of that config to set.

    Raises:
      ConfigError: if there is no checkpoint or it does not fit.
      CheckpointBroken: if it is not what was saved.
    """
    check_platform()
    try:
        extra = saved_extra(source, step)
        config = saved_config(extra, changes) if config is None else config
        program = _program(config)
        variables, extra = load_run(source, step=step, sharding=program.sharding)
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from None
    return program, placed(program, variables), extra


def saved_config(extra: Mapping[str, Any], changes: Mapping[str, str] | None = None) -> TrainConfig:
    """The config that a checkpoint holds, with some fields set.

    Raises:
      ConfigError: if it holds none, a field is not there, or data has moved.
    """
    saved = extra.get("config")
    if saved is None:
        raise ConfigError("The checkpoint holds no config; give the config file it was made with.")
    for place, value in (changes or {}).items():
        saved = with_field(saved, place.split("."), value, f"--{place}")
    try:
        return configs.from_json(saved)
    except FileNotFoundError as missing:
        data = saved.get("data") or {}
        if not saved.get("evaluators"):  # metrics need no training data
            with contextlib.suppress(FileNotFoundError, KeyError):
                return configs.from_json({**saved, "data": {**data, "train": data["eval"]}})
        raise ConfigError(configs.moved(str(missing), saved)) from missing


def evaluate_checkpoint(
    config: TrainConfig, checkpoint: str | os.PathLike, adapt: bool = False
) -> dict[str, float]:
    """Metrics of a published checkpoint, or of a run, on the held-out examples of a config.

    Args:
      config: names the model, the data and the task.
      checkpoint: an official file, as `zoo.load` takes it, or a run directory.
      adapt: as in `zoo.load`.

    Raises:
      ConfigError: if the file is not there or does not fit.
    """
    check_platform()
    if is_run(checkpoint):
        program, variables, _ = open_run(checkpoint, config=config)
        with tempfile.TemporaryDirectory() as folder:
            return _evaluate(program, variables, Path(folder))
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
    """The task's metrics, then what the evaluators of the config say, then those of the test."""
    data = program.config.data
    for source in (data.eval, data.test):
        if hasattr(source, "check"):
            with reading("the held-out data"):
                source.check()
    with program.context(), fitting("The model, the task and the held-out data"):
        found = program.evaluate(variables)
        for evaluator in program.config.evaluators:
            folder.mkdir(parents=True, exist_ok=True)
            found |= evaluator.run(program, variables, data, folder)
        if data.test is not None:
            other = dataclasses.replace(data, eval=data.test, test=None)
            test = program.evaluate(variables, other)
            found |= {f"test/{name}": value for name, value in test.items()}
    return found
