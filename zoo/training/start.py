"""The first state of a run: fresh parameters, or those of a published checkpoint."""

import dataclasses
from pathlib import Path

import jax

import zoo
from zoo.errors import ConfigError
from zoo.training.program import Program
from zoo.training.state import State


def first_state(program: Program) -> State:
    """The state that a new run begins with.

    With `model.checkpoint`, parameters (their running mean too) and collections are those of that
    file or run, in the types and places of the program's state.

    Raises:
      ConfigError: if the checkpoint is not there or does not fit.
    """
    config = program.config
    state = program.init(config.seed)
    if config.model.checkpoint is None:
        return state
    if ":" in config.model.name:
        raise ConfigError(
            f"model.checkpoint goes with a model of the zoo, not with {config.model.name!r}, for "
            "which there are no checkpoint rules."
        )
    source = config.model.checkpoint
    source = Path(source).expanduser() if Path(source).expanduser().exists() else source
    try:
        _, variables = zoo.load(
            config.model.name,
            source,
            adapt=config.model.adapt,
            rng=jax.random.key(config.seed),
            **config.model.overrides,
        )
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model.checkpoint: {error}") from None
    whole = program.to_global(state)

    def put(new, old):
        return jax.device_put(new.astype(old.dtype), old.sharding)

    variables = dict(variables)
    params = jax.tree.map(put, variables.pop("params"), whole.params)
    collections = jax.tree.map(put, variables, whole.collections)
    ema = None if whole.ema is None else jax.tree.map(lambda x: x.copy(), params)
    whole = dataclasses.replace(whole, params=params, collections=collections, ema=ema)
    return program.from_global(whole)
