"""A network with its variables and what it needs to read inputs: transforms, names, scales."""

import contextlib
import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import zoo
from zoo.checkpoints import hub_config
from zoo.checkpoints.files import is_orbax, resolve
from zoo.checkpoints.hub_config import Beside
from zoo.checkpoints.runs import load_run, saved_extra
from zoo.data import Data
from zoo.errors import ConfigError
from zoo.tasks import (
    Classification,
    Forecasting,
    ImageRestoration,
    LanguageModelling,
    MaskedLanguageModelling,
    Task,
    VideoPrediction,
)
from zoo.tasks.apply import check_inputs
from zoo.training import config as configs
from zoo.training.checks import check_platform
from zoo.training.fields import TYPE, with_field


@dataclass(frozen=True)
class Predictor:
    """What answers are made with.

    Attributes:
      network: as the task takes it, or networks by name.
      variables: of it.
      task: what it was trained for; None: its `__call__` is asked.
      transforms: of held-out examples.
      facts: what the run knew of its data: `classes`, `variates`, and their `scale`.
      source: the held-out source of the run's config, as saved (JSON).
      tokenizer: of texts.
      batch_size: examples at a time.
      predict: `(variables, batch) -> {name: array}`.
      context: makes what `predict` is called in.
      stops: tokens that end a continuation.
    """

    network: Any
    variables: Mapping[str, Any]
    task: Task | None
    predict: Any = field(repr=False)
    transforms: tuple = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    batch_size: int = 32
    context: Any = contextlib.nullcontext
    stops: tuple[int, ...] = ()

    @property
    def inputs(self) -> dict[str, Any]:
        """Shapes of one example's inputs, by name."""
        network = self.network
        if not isinstance(network, nn.Module):
            network = network["student"] if "student" in network else next(iter(network.values()))
        return dict(network.example_inputs(1))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What is said of a batch of NumPy arrays.

        Raises:
          ConfigError: if the batch does not fit the network.
        """
        try:
            if self.task is not None and isinstance(self.network, nn.Module):
                check_inputs(self.network, batch)
            with self.context():
                return jax.device_get(self.predict(self.variables, dict(batch)))
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"The input does not fit the network: {error}") from error


def of_run(
    run: str | os.PathLike, step: int | None = None, changes: Mapping[str, str] | None = None
) -> Predictor:
    """The predictor of a run's checkpoint. The run's data need not be there.

    Args:
      run: a run directory, or one step in its `checkpoints`.
      step: which step; None is the newest that is whole.
      changes: fields of its config to set.

    Raises:
      ConfigError: if there is no checkpoint, or its config cannot be read.
    """
    from zoo.training.evaluation import _program
    from zoo.training.start import placed

    check_platform()
    try:
        extra = saved_extra(run, step)
        saved = extra.get("config") or {}
        for place, value in (changes or {}).items():
            saved = with_field(saved, place.split("."), value, f"--{place}")
        data = saved["data"]
        rest = {k: configs.from_json(v) for k, v in saved.items()
                if k not in ("data", "evaluators", TYPE)}  # fmt: skip
        transforms = configs.from_json(data.get("eval_transforms", []))
        size = int(data.get("eval_batch_size") or data.get("batch_size") or 32)
        config = configs.TrainConfig(
            **rest, data=Data((), (), batch_size=int(data.get("batch_size", 32)))
        )
        program = _program(config)
        variables, extra = load_run(run, step=step, sharding=program.sharding)
    except KeyError as error:
        raise ConfigError(f"The checkpoints of {run} hold no config ({error}).") from None
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None
    return Predictor(
        program.networks, placed(program, variables), program.task, program.predict, transforms,
        extra.get("facts", {}), data.get("eval") or {}, _tokenizer(transforms), size,
        program.context,
    )  # fmt: skip


def of_model(
    name: str | None,
    weights: str | os.PathLike,
    *,
    classes: Sequence[str] = (),
    tokenizer: str | os.PathLike | None = None,
    **overrides: Any,
) -> Predictor:
    """The predictor of a published checkpoint.

    Args:
      name: of a variant; None: what `config.json` in the folder of the weights says.
      weights: as `zoo.load` takes them; a run directory too.
      classes: their names, by number; none: those in `config.json`.
      tokenizer: as `zoo.data.text.Tokenizer` takes it; None: one beside the weights, if any.
      **overrides: fields of the module.

    Raises:
      ValueError: if the weights do not fit the name, or the folder is of a model with a head that
        this one does not have.
      FileNotFoundError: if they are not there.
    """
    check_platform()
    variant = zoo.info(name) if name is not None else None
    beside = Beside() if is_orbax(weights) else hub_config.read(resolve(weights))
    if name is None:
        network, variables, report = zoo.load(weights, return_report=True, **overrides)
    else:
        network, variables, report = zoo.load(name, weights, return_report=True, **overrides)
    variant = variant or zoo.info(str(beside.base))
    task = _task_of(variant.task)
    if name is None and beside.architecture:
        task = _task_of_folder(network, beside, weights)
    inputs, transforms, found = network.example_inputs(1), (), None
    how = report.preprocessing or variant.preprocessing
    if "images" in inputs and how is not None:
        from zoo.data.transforms import transforms_of

        transforms = transforms_of(how, tuple(inputs["images"].shape[1:3]))
    if "tokens" in inputs:
        place = Path(tokenizer) if tokenizer else Path(weights)
        place = place if place.is_dir() or tokenizer else place.parent
        found = text_tokenizer(place, _longest(network, task), bool(tokenizer))
    of_words = getattr(network, "head", None) in (None, "sentence")
    of_words &= not beside.architecture.endswith("ForSequenceClassification")

    @jax.jit
    def predict(variables: Any, batch: Any) -> Any:
        if task is not None:
            return task.predict(network, variables, batch)
        own = {name: batch[name] for name in inputs if name in batch}
        said = _named(network.apply(variables, **own))
        embeds = variant.task == "text_encoding" or (name is None and of_words)
        embeds = embeds and said.get("output") is not None and said["output"].ndim == 2
        return {"embedding": said["output"]} if embeds else said

    facts = {"classes": list(classes or beside.classes)}
    return Predictor(
        network, variables, task, predict, transforms, facts, {}, found, stops=beside.stops
    )


def _longest(network: nn.Module, task: Task | None) -> int:
    """Tokens at which texts are cut: what the model takes; 512 where all are read at once."""
    if "length" not in inspect.signature(network.example_inputs).parameters:
        return network.example_inputs(1)["tokens"].shape[1]
    most = 1 << 16 if isinstance(task, LanguageModelling) else 512
    return network.example_inputs(1, length=most)["tokens"].shape[1]


def _task_of_folder(network: nn.Module, beside: Beside, folder: str | os.PathLike) -> Task | None:
    """The task of the class of transformers that a folder was saved from; None: a trunk.

    Raises:
      ConfigError: if the class has a head that this model does not have.
    """
    saved, classes = beside.architecture, getattr(network, "num_classes", 0)
    decodes = hasattr(network, "init_state") and not hasattr(network, "head")
    lacks = () if classes else ("ForSequenceClassification",)
    if decodes and saved.endswith(("ForTokenClassification", "ForQuestionAnswering", *lacks)):
        raise ConfigError(
            f"{os.fspath(folder)} was saved from {saved}, whose head {type(network).__name__} does "
            "not have; --feature gives what the trunk says: zoo predict NAME FOLDER TEXT --feature "
            "last_hidden_state."
        )
    if saved.endswith("ForSequenceClassification") and classes == 1:
        return None  # a number, such as a reward, and no class
    return next((task for end, task in _FOLDERS.items() if saved.endswith(end)), None)


_FOLDERS: dict[str, Task] = {
    "PatchTSTForPrediction": Forecasting(),
    "PatchTSTForClassification": Classification(),
    "ForImageClassification": Classification(),
    "ForImageClassificationWithTeacher": Classification(),
    "ForVideoClassification": Classification(),
    "ForSequenceClassification": Classification(),
    "ForMaskedLM": MaskedLanguageModelling(),
    "ForCausalLM": LanguageModelling(),
    "LMHeadModel": LanguageModelling(),
    "DoubleHeadsModel": LanguageModelling(),
}


def with_feature(predictor: Predictor, name: str) -> Predictor:
    """The predictor that gives a named intermediate of the network: embeddings, for example.

    Raises:
      ConfigError: if the network has none of that name; it lists those that it has.
    """
    from dataclasses import replace

    network = predictor.network

    def features(variables: Any, batch: Any) -> dict[str, Any]:
        own = {key: batch[key] for key in network.example_inputs(1) if key in batch}
        return network.apply(variables, **own, method="features")

    if not hasattr(network, "features"):
        raise ConfigError(f"{type(network).__name__} has no features to ask for.")
    zeros = {key: jax.numpy.zeros(s.shape, s.dtype) for key, s in predictor.inputs.items()}
    shapes = jax.eval_shape(features, predictor.variables, zeros)
    known = [key for key, shape in shapes.items() if hasattr(shape, "shape")]
    if name not in known:
        raise ConfigError(f"There is no feature {name!r}; there are {', '.join(known)}.")
    predict = jax.jit(lambda variables, batch: {"embedding": features(variables, batch)[name]})
    return replace(predictor, task=None, predict=predict)


def text_tokenizer(place: Path, length: int, asked: bool) -> Any:
    """A tokenizer of a file or folder that cuts at a length; None where there is none.

    Raises:
      FileNotFoundError: if there is none and it was asked for.
    """
    from zoo.data.text import FILES, Tokenizer

    inside = place.is_file() or any((place / name).is_file() for name in FILES)
    if not inside and not asked:
        return None
    return Tokenizer(place, max_length=length)


def _tokenizer(transforms: Sequence[Any]) -> Any:
    """The tokenizer among transforms, if there is one."""
    return next((t.tokenizer for t in transforms if hasattr(t, "tokenizer")), None)


@functools.cache
def _task_of(kind: str) -> Task | None:
    """The task whose `predict` fits a variant of this kind."""
    known: dict[str, Task] = {
        "image_classification": Classification(),
        "video_classification": Classification(),
        "series_classification": Classification(),
        "graph_classification": Classification(),
        "forecasting": Forecasting(),
        "language_modelling": LanguageModelling(),
        "masked_language_modelling": MaskedLanguageModelling(),
        "masked_lm": MaskedLanguageModelling(),
        "super_resolution": ImageRestoration(),
        "video_prediction": VideoPrediction(),
    }
    return known.get(kind)


def _named(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {name: x for name, x in output.items() if hasattr(x, "shape")}
    if isinstance(output, tuple):
        return {f"output{i}" if i else "output": x for i, x in enumerate(output)}
    return {"output": output}
