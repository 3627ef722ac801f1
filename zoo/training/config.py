"""What a training run is made of, as frozen dataclasses.

A config file has `get_config() -> TrainConfig`; every field can be set on the command line by its
path (`--optimizer.learning-rate 1e-3`). `save` writes the resolved config as JSON that reads well
and that `load` turns into the same dataclasses again.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import AvoidSubcommands, Fixed

from zoo.errors import ConfigError
from zoo.evaluators.evaluator import Evaluator
from zoo.kinds import check_kinds
from zoo.methods.method import Method
from zoo.tasks.task import Task, lower_is_better
from zoo.training.fields import TYPE, with_field


@dataclass(frozen=True)
class Model:
    """Which model, and what differs from its variant."""

    name: str
    """A variant of the zoo (`zoo list`), or a module of your own: file.py:Class, package:Class."""
    overrides: Fixed[dict[str, Any]] = field(default_factory=dict)
    """Fields of the module to replace: --model.overrides.drop-path 0.1, one flag a field."""
    checkpoint: str | None = None
    """What a new run starts from, as zoo.load takes it: an official file, a run, a hub id."""
    adapt: bool = False
    """Fit a checkpoint of another image size or number of classes, as zoo.load does."""


@dataclass(frozen=True)
class Optimizer:
    """The update rule, its schedule and what happens to gradients before it."""

    name: Literal["adamw", "adam", "sgd", "lamb", "lion", "adafactor", "nadamw", "rmsprop"] = (
        "adamw"
    )
    """Rule of optax. Weight decay is decoupled in all of them."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "cosine"
    """Shape after the warmup. one_cycle: up over 30 % of the steps, then down, both a cosine."""
    warmup_steps: int = 0
    """Steps of linear rise from `initial_fraction` of the peak (not used by one_cycle)."""
    initial_fraction: float = 0.0
    """Learning rate at step 0, as a fraction of the peak (with a warmup or one_cycle)."""
    final_fraction: float = 0.0
    """Learning rate at the last step, as a fraction of the peak (linear, cosine, one_cycle)."""
    weight_decay: float = 0.0
    """Decay of each step, times the learning rate, of the leaves that decay."""
    no_decay: tuple[str, ...] = ()
    """More path patterns (regex) without decay, beside biases, norms, position tables, tokens."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a layer to the one below it, from the head down."""
    rate_multipliers: dict[str, float] = field(default_factory=dict)
    """Path pattern (regex) -> factor of the learning rate of its leaves: PATTERN FACTOR ..."""
    decay_multipliers: dict[str, float] = field(default_factory=dict)
    """Path pattern (regex) -> factor of the weight decay of its leaves: PATTERN FACTOR ..."""
    b1: float = 0.9
    """First moment, or the momentum of sgd and rmsprop."""
    b2: float = 0.999
    """Second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    clip: float | None = None
    """Largest global norm of the gradient; None for no clipping."""
    accumulate: int = 1
    """Microbatches a step. The gradient is exactly that of the whole batch, at a part of the
    memory; batch statistics, where a model has any, are those of each microbatch."""


@dataclass(frozen=True)
class Partition:
    """How the run is spread over the devices: the sizes of the mesh axes."""

    mode: Literal["sharding", "pmap"] = "sharding"
    """sharding: one program over the mesh. pmap: a replica on each device (axis `data` only)."""
    data: int = -1
    """Copies of the model, each with its part of the batch; -1 takes all remaining devices."""
    fsdp: int = 1
    """Parts into which parameters, optimizer state and the batch are cut."""
    tensor: int = 1
    """Parts into which heads and MLP channels are cut."""
    sequence: int = 1
    """Parts into which the length of a sequence is cut."""
    fsdp_min_size: int = 1024
    """Leaves with fewer elements stay whole on every device, and so do those of one axis."""
    remat: Literal["none", "full", "dots", "attention"] | None = None
    """What blocks keep for the backward pass: all, their input, also products with weights, or
    also what attention needs; the rest is computed twice. None: as the model's field says."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: its state lives in the hosts' memory and visits the device in each step."""


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written and which are kept."""

    every: int = 0
    """Steps between checkpoints; 0 only at the end and when the run is asked to stop."""
    keep: int = 3
    """How many of the latest are kept."""
    keep_best: int = 1
    """How many of the best, by `metric`, are kept besides."""
    metric: str | None = None
    """The evaluation metric that says which is best; None: the task's own."""
    mode: Literal["max", "min"] | None = None
    """Whether a large or a small metric is good; None: small ones of losses and errors."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: Annotated[Model | dict[str, Model], AvoidSubcommands]
    """The network, or several by name for a task that takes several."""
    task: Task
    """What is learnt: loss, metrics and predictions (zoo.tasks)."""
    data: Any
    """Where examples come from and what is done to them (zoo.data.Data)."""
    optimizer: Annotated[Optimizer | dict[str, Optimizer], AvoidSubcommands] = Optimizer()
    """Of all that is trained, or one a group: networks are groups, methods name others."""
    methods: tuple[Method, ...] = ()
    """What changes the network or which leaves are trained (zoo.methods), from left to right."""
    freeze: tuple[str, ...] = ()
    """Path patterns (regex, whole path) of leaves that are not trained."""
    evaluators: tuple[Evaluator, ...] = ()
    """What is measured or drawn over whole data sets (zoo.evaluators)."""
    partition: Partition = Partition()
    checkpoint: Checkpointing = Checkpointing()
    num_steps: int = 1000
    """Optimizer steps of the run."""
    eval_every: int = 0
    """Steps between evaluations; 0 only at the end."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl; each is the mean over them."""
    seed: int = 0
    """Of initialisation, data order, augmentation and dropout: same seed, same bits."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in. Parameters, optimizer and reductions are float32."""
    ema_decay: float | None = None
    """Decay of the running mean of the parameters that evaluation then uses; None for none."""
    guard: Literal["raise", "skip", "rollback"] = "raise"
    """On a NaN or infinite loss or gradient: stop, leave the step out, or go back to the newest
    checkpoint and on with other batches. Parameters never take such a step."""
    guard_limit: int = 10
    """How many bad steps in a row (skip), or rollbacks, end the run."""
    prefetch: int = 2
    """Batches that are made ready ahead of the step."""
    compilation_cache: str | None = "~/.cache/flax-zoo/xla"
    """Where compiled programs are kept for the next start; JAX_COMPILATION_CACHE_DIR goes first."""

    def __post_init__(self) -> None:
        """Check what can be checked without the model.

        Raises:
          ConfigError: naming the first field that is of a wrong kind or out of range.
        """
        for part in _parts(self):
            check_kinds(part)
        if not hasattr(self.data, "train"):
            raise ConfigError(f"TrainConfig.data is {self.data!r}; it must be a zoo.data.Data.")
        positive = ("num_steps", "log_every", "prefetch", "guard_limit")
        inf = float("inf")
        ranges = [(self, name, 1, inf) for name in positive] + [
            (self, "eval_every", 0, inf),
            (self, "seed", 0, 2**63 - 1),
            (self.checkpoint, "every", 0, inf),
            (self.checkpoint, "keep", 1, inf),
            (self.checkpoint, "keep_best", 0, inf),
            (self.partition, "fsdp_min_size", 0, inf),
            *((self.partition, axis, 1, inf) for axis in ("fsdp", "tensor", "sequence")),
        ]
        for name in ("batch_size", "eval_batch_size", "repeats", "threads"):
            if isinstance(getattr(self.data, name, None), int):
                ranges.append((self.data, name, 1, inf))
        for optimizer in self.optimizers.values():
            ranges += [
                (optimizer, "accumulate", 1, inf),
                (optimizer, "warmup_steps", 0, inf),
                (optimizer, "b1", 0, 1),
                (optimizer, "b2", 0, 1),
                *((optimizer, n, 0, inf) for n in (
                    "learning_rate", "initial_fraction", "final_fraction", "weight_decay",
                    "layer_decay", "eps", "clip")),
            ]  # fmt: skip
            patterns = (*self.freeze, *optimizer.no_decay, *optimizer.rate_multipliers,
                        *optimizer.decay_multipliers)  # fmt: skip
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(
                        f"{pattern!r} is no pattern of paths ({error}); they are regular "
                        "expressions, in which any text is '.*'."
                    ) from None
            factors = {**optimizer.rate_multipliers, **optimizer.decay_multipliers}
            for pattern, factor in factors.items():
                if not 0 <= factor < inf:
                    raise ConfigError(f"The factor of {pattern!r} is {factor}; give 0 or more.")
        for part, name, least, most in ranges:
            value = getattr(part, name)
            if value is not None and not (least <= value <= most and value != inf):
                bound = f"between {least} and {most}" if most == 1 else f"at least {least}"
                raise ConfigError(f"{type(part).__name__}.{name} is {value}; it must be {bound}.")
            if optimizer.clip == 0:
                raise ConfigError("Optimizer.clip is 0, which leaves no gradient; give None.")
        if self.partition.data == 0 or self.partition.data < -1:
            raise ConfigError(f"Partition.data is {self.partition.data}; give copies, or -1.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must be in [0, 1), or None.")
        if len({optimizer.accumulate for optimizer in self.optimizers.values()}) > 1:
            raise ConfigError("All optimizers of a run must have the same number in accumulate.")

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by group; the only one of a run has the name of none, ''."""
        return self.optimizer if isinstance(self.optimizer, dict) else {"": self.optimizer}

    @property
    def best(self) -> tuple[str, str]:
        """The metric by which checkpoints are compared, and `max` or `min`."""
        name = self.checkpoint.metric or self.task.metric
        mode = self.checkpoint.mode or ("min" if lower_is_better(name) else "max")
        return name, mode

    @property
    def accumulate(self) -> int:
        """Microbatches a step."""
        return next(iter(self.optimizers.values())).accumulate


def _parts(value: Any) -> Iterator[Any]:
    """The zoo's own dataclasses in a config, itself first, at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__module__.startswith("zoo."):
            yield value
        inner = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    else:
        inner = list(value.values()) if isinstance(value, dict) else value
    if isinstance(inner, tuple | list):
        for one in inner:
            yield from _parts(one)


@dataclass(frozen=True)
class Command:
    """Train the model that a config file describes.

    The config file comes first (default: configs/default.py), then any of its fields by path, as
    `--optimizer.learning-rate 1e-3` or `optimizer.learning_rate=1e-3`.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    workdir: Path | None = None
    """The run directory; a run in it is continued. Default: runs/<config>-<time>."""
    profile: bool = False
    """Write a trace of the steps 10 to 20 after the start into the run directory, for xprof or
    Perfetto."""
    distributed: bool = False
    """Join other processes as JAX finds them; not needed with SLURM, GKE or the JAX_ variables."""
    origin: tyro.conf.Suppress[Any] = None
    """The config file and the flags that a new run is begun with."""


# ---------------------------------------------------------------------------- config files


def load_file(path: str | os.PathLike) -> TrainConfig:
    """The config that a file's `get_config()` gives.

    Raises:
      ConfigError: if there is no such file, it has no get_config that gives a TrainConfig, that
        finds no data (raised from a FileNotFoundError), or the file fails otherwise, with the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no config file {str(path)!r}; ls configs/ shows those here.")
    if path.suffix != ".py":
        raise ConfigError(
            f"{str(path)!r} is no config file: those are Python files that end in .py."
        )
    try:
        get_config = getattr(_module(str(path)), "get_config", None)
        if not callable(get_config):
            raise ConfigError(f"{path} has no function get_config() -> TrainConfig.")
        config = get_config()
    except ConfigError:
        raise
    except (FileNotFoundError, ValueError) as error:  # of data that is not there, or not as said
        raise ConfigError(" ".join(str(error).split())) from error
    except Exception as error:  # of the file itself: a misspelt name, say
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
                 if f.filename == str(path.resolve())]  # fmt: skip
        where = f"{path}{f', line {lines[-1]}' if lines else ''}"
        text = " ".join(str(error).split())
        raise ConfigError(f"{where}: {type(error).__name__}: {text.rstrip('.')}.") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"get_config() of {path} gave a {type(config).__name__}, no TrainConfig.")
    return config


def resolve(reference: str) -> Any:
    """The object of `file.py:Name` or `package.module:Name`.

    Raises:
      ConfigError: if it is not there.
    """
    place, _, name = reference.rpartition(":")
    try:
        target = _module(place)
        for part in name.split("."):
            target = getattr(target, part)
    except (ImportError, FileNotFoundError, AttributeError, ValueError) as error:
        raise ConfigError(f"Cannot find {reference!r}: {error}.") from None
    return target


def _module(place: str) -> Any:
    """A module by file (loaded once, registered under its path) or by dotted name."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    for module in list(sys.modules.values()):  # a file that is already imported, by any name
        if getattr(module, "__file__", None) == str(path) and module.__name__ != "__main__":
            return module
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(path)] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[str(path)]
        raise
    return module


# ---------------------------------------------------------------------------- JSON


def save(config: TrainConfig, path: str | os.PathLike) -> None:
    """Write a config as JSON, at once or not at all."""
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(to_json(config), indent=2) + "\n")
    os.replace(draft, path)


def load(path: str | os.PathLike, changes: Mapping[str, str] | None = None) -> TrainConfig:
    """Read what `save` wrote.

    Args:
      path: of the file.
      changes: fields to set first, as `data.train.path` -> text: the place of data that has moved.

    Raises:
      ConfigError: if it is no config, or names what this version does not have.
    """
    text: Any = None
    try:
        text = json.loads(Path(path).read_text())
        for place, value in (changes or {}).items():
            text = with_field(text, place.split("."), value, f"--{place}")
        config = from_json(text)
    except FileNotFoundError as missing:
        raise ConfigError(moved(str(missing), text)) from missing
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a saved config: {error}.") from None
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path} is not a saved config.")
    return config


def to_json(value: Any) -> Any:
    """A config value as JSON: dataclasses and functions carry their name, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if "<" in type(value).__qualname__:
            return {TYPE: "unsaved", "what": f"{type(value).__name__} of a function"}
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {TYPE: _reference(type(value)), **{k: to_json(v) for k, v in fields.items()}}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, type | FunctionType):
        if "<" in value.__qualname__:
            return {TYPE: "unsaved", "what": f"function {value.__qualname__.rpartition('.')[2]}"}
        return {TYPE: "function", "name": _reference(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    shape = f" of shape {value.shape}" if hasattr(value, "shape") else ""
    return {TYPE: "unsaved", "what": f"{type(value).__name__}{shape}"}


def from_json(value: Any) -> Any:
    """The inverse of `to_json`; lists become tuples.

    Raises:
      ConfigError: for what was not saved (arrays in memory), or has other fields today.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    kind = value.get(TYPE)
    if kind == "unsaved":
        raise ConfigError(
            f"The config holds a {value['what']} in memory, which is not saved with it; give the "
            "config again: train.py CONFIG --workdir RUN, eval.py CONFIG --checkpoint RUN, or "
            "evaluate_run(RUN, config=...)."
        )
    if kind == "function":
        return resolve(value["name"])
    fields = {k: from_json(v) for k, v in value.items() if k != TYPE}
    if kind is None:
        return fields
    cls = resolve(kind)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"The config names {kind!r}, which is no dataclass.")
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(f"{kind} has no field {unknown[0]!r} in this version of the zoo.")
    return cls(**fields)


def moved(sentence: str, saved: Any) -> str:
    """What to say of saved data that is not there: which flags say where it is."""
    flags = []

    def look(node: Any, place: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            here = f"{place}.{key}" if place else key
            if key in ("path", "data_dir", "source") and isinstance(value, str):
                flags.extend([here] if not Path(value).exists() else [])
            look(value, here)

    look(saved.get("data") if isinstance(saved, dict) else None, "data")
    if not flags:
        return sentence
    given = " ".join(f"--{flag.replace('_', '-')} PLACE" for flag in flags)
    return f"{sentence} If it has moved, give {given}"


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two configs, one `field: old -> new` each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in (*old, *(k for k in new if k not in old)) if k != TYPE]
        return [
            line
            for k in keys
            for line in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def readable(config: Any, indent: str = "") -> str:
    """A config as indented `name: value` lines."""
    lines = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            lines.append(f"{indent}{f.name}: {type(value).__name__}")
            lines.append(readable(value, indent + "  "))
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            lines.append(f"{indent}{f.name}:")
            lines += [f"{indent}  {part}" for part in value]
        else:
            shape = getattr(value, "shape", None)
            lines.append(f"{indent}{f.name}: {value if shape is None else f'array {shape}'}")
    return "\n".join(line for line in lines if line)


def _reference(value: Any) -> str:
    module = value.__module__
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    script = module == "__main__" and file  # of a notebook there is no file
    place = file if module.endswith(".py") or script else module
    return f"{place}:{value.__qualname__}"
