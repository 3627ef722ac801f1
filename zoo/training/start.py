"""The first state of a run: fresh parameters, or those of checkpoints; and one that goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

import zoo
from zoo.errors import ConfigError
from zoo.tasks.task import Task, joined
from zoo.training.config import Model
from zoo.training.program import METHODS, Program
from zoo.training.state import State


def first_state(program: Program) -> State:
    """The state that a new run begins with.

    With `model.checkpoint`, parameters (their running mean too) and collections are those of that
    file or run, in the types and places of the program's state: each leaf goes straight to where it
    lives. Methods that calibrate see batches of training data first.

    Raises:
      ConfigError: if a checkpoint is not there or does not fit.
    """
    config = program.config
    models = {"": config.model} if isinstance(config.model, Model) else config.model
    if not any(model.checkpoint for model in models.values()) and not _calibrates(program):
        return program.init(config.seed)
    return program.init_with(first_variables(program), config.seed)


def first_variables(program: Program) -> dict[str, Any]:
    """The variables that a run begins with, in the types and places of its state.

    Raises:
      ConfigError: if a checkpoint is not there or does not fit.
    """
    config = program.config
    models = {"": config.model} if isinstance(config.model, Model) else config.model
    key = jax.random.key(config.seed)
    each = {
        name: _variables(program, name, model, jax.random.fold_in(key, i) if name else key)
        for i, (name, model) in enumerate(models.items())
    }
    variables = each[""] if "" in each else joined(each)
    if config.methods:
        batches = _training_batches(program) if _calibrates(program) else None
        variables = program.adapt(variables, jax.random.fold_in(key, METHODS), batches)
    return placed(program, variables)


def placed(program: Program, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables in the types and places of a program's state, leaf by leaf."""
    wanted = flatten_dict(program.abstract.variables(averaged=False))
    flat = flatten_dict(dict(variables))
    return unflatten_dict(
        {
            path: jax.device_put(flat[path].astype(leaf.dtype), leaf.sharding)
            for path, leaf in wanted.items()
        }
    )


def completed(program: Program, parts: Mapping[str, Any]) -> State:
    """A state of a checkpoint's parts; what they lack is that of a run that begins with them.

    An optimizer that the checkpoint does not have begins with zeros, a running mean as the
    parameters are.
    """
    wanted = flatten_dict(program.abstract.to_parts(), sep="/")
    found = flatten_dict(dict(parts), sep="/")
    if wanted.keys() - found.keys():
        fresh = flatten_dict(
            program.to_global(program.init(program.config.seed)).to_parts(), sep="/"
        )
        found = {path: found.get(path, fresh[path]) for path in wanted}
    return State.from_parts(unflatten_dict(found, sep="/"), program.abstract)


def _calibrates(program: Program) -> bool:
    return any(method.calibration for method in program.config.methods)


def _training_batches(program: Program) -> list[Mapping[str, Any]]:
    """As many batches of training data as the methods want to see."""
    from zoo.data import train_iterator

    config = program.config
    count = max(method.calibration for method in config.methods)
    iterator = train_iterator(config.data, config.seed, *program.share())
    return [next(iterator) for _ in range(count)]


def _variables(program: Program, name: str, model: Model, rng: jax.Array) -> dict[str, Any]:
    """Variables of one network: those of its checkpoint, in their places, or fresh ones."""
    network = program.base if isinstance(program.base, nn.Module) else program.base[name]
    if model.checkpoint is None:
        task = program.task if name == "" else Task()
        return jax.jit(lambda rng: task.init(network, rng))(rng)
    if ":" in model.name:
        raise ConfigError(
            f"model.checkpoint goes with a model of the zoo, not with {model.name!r}, for which "
            "there are no checkpoint rules."
        )
    source = Path(model.checkpoint).expanduser()

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return program.sharding(f"{name}/{path}" if name else path, shape)

    try:
        _, variables = zoo.load(
            model.name,
            source if source.exists() else model.checkpoint,
            adapt=model.adapt,
            rng=rng,
            sharding=place,
            **model.overrides,
        )
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model.checkpoint: {error}") from None
    return variables
