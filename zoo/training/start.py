"""The first state of a run: fresh parameters, or those of checkpoints; and one that goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

import zoo
from zoo import registry
from zoo.checkpoints import rules
from zoo.checkpoints.runs import is_run, load_run
from zoo.errors import ConfigError
from zoo.methods.method import wrap_all
from zoo.system import of as system_of
from zoo.tasks.apply import zeros_like_inputs
from zoo.tasks.task import Task, joined
from zoo.training.config import Model, from_json
from zoo.training.program import METHODS, Program, build_model
from zoo.training.state import State


def first_state(program: Program, batch: Any = None) -> State:
    """The state that a new run begins with.

    With a placed batch the training step is compiled for it meanwhile.

    With `model.checkpoint`, parameters (their running mean too) and collections are those of that
    file or run, in the types and places of the program's state: each leaf goes straight to where it
    lives. Methods that calibrate see batches of training data first.

    Raises:
      ConfigError: if a checkpoint is not there or does not fit.
    """
    config = program.config
    models = {"": config.model} if isinstance(config.model, Model) else config.model
    fresh = not any(model.checkpoint for model in models.values()) and not _calibrates(program)
    variables = None if fresh else first_variables(program)
    if batch is not None:
        program.compile_ahead(batch)
    if variables is None:
        return program.init(config.seed)
    return program.init_with(variables, config.seed)


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
    source = Path(model.checkpoint).expanduser()

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return program.sharding(f"{name}/{path}" if name else path, shape)

    if is_run(source):
        return _of_run(network, model, source, rng, place)
    if ":" in model.name:
        raise ConfigError(
            f"model.checkpoint is {model.checkpoint!r}, which is no run directory; {model.name!r} "
            "is no model of the zoo, for which there are no rules to read other files by."
        )
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


def _of_run(
    network: nn.Module, model: Model, source: Path, rng: jax.Array, place: Any
) -> dict[str, Any]:
    """What a run has learnt, for this network: leaves of its shapes; with `adapt` others too.

    Of a model of the zoo, what differs in shape is adapted as of a published file (tables of
    positions are resized, a head of other classes starts afresh); of a network of one's own it
    starts afresh.

    Raises:
      ConfigError: if it does not fit and `adapt` is not set.
    """
    try:
        variables, extra = load_run(source, sharding=place)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise ConfigError(f"model.checkpoint: {error}") from None
    base, variables = _merged(extra, variables)
    found = flatten_dict(variables, sep="/")
    wanted = flatten_dict(
        jax.eval_shape(lambda r: network.init(r, **zeros_like_inputs(network)), rng), sep="/"
    )
    other = [p for p in found if p in wanted and found[p].shape != wanted[p].shape]
    missing = [path for path in wanted if path not in found]
    unused = [path for path in found if path not in wanted]
    if not (other or missing or unused):
        return variables
    said = "; ".join(
        f"{what} {', '.join(paths[:4])}{' ...' if len(paths) > 4 else ''}"
        for what, paths in (
            ("of another shape:", other), ("not in the run:", missing), ("not used:", unused)
        )
        if paths
    )  # fmt: skip
    if not model.adapt:
        raise ConfigError(
            f"model.checkpoint: the run {str(source)!r} is of another network ({said}); set "
            "--model.adapt to take what fits and begin the rest afresh."
        )
    if len(missing) + len(other) == len(wanted):
        raise ConfigError(f"model.checkpoint: nothing of the run {str(source)!r} fits ({said}).")
    print(f"From {source}: {len(wanted) - len(missing) - len(other)} leaves are taken; {said}.")
    if base is not None and ":" not in model.name and system_of(base) is system_of(network):
        try:
            return rules.convert(
                registry.layouts(network), zoo.export(base, variables), network,
                adapt=True, rng=rng, sharding=place,
            )  # fmt: skip
        except ValueError:
            pass  # the rules do not resize it: begin afresh what differs
    fresh = jax.jit(lambda r: network.init(r, **zeros_like_inputs(network)))(rng)
    flat = flatten_dict(dict(fresh), sep="/")
    fits = {p: x for p, x in found.items() if p in wanted and p not in other}
    return unflatten_dict({**flat, **fits}, sep="/")


def _merged(
    extra: Mapping[str, Any], variables: dict[str, Any]
) -> tuple[nn.Module | None, dict[str, Any]]:
    """The run's network without its methods, and the variables of that."""
    try:
        saved = extra["config"]
        model = from_json(saved["model"])
        methods = from_json(saved.get("methods", []))
        base = build_model(model)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, variables
    wrapped = wrap_all(base, methods)
    for method in reversed(methods):
        wrapped, variables = method.merge(wrapped, variables)
    return base, variables
