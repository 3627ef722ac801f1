"""From inputs to rows of answers, a batch at a time: rows are given as soon as they are known."""

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.images import FOREIGN, IMAGE_SUFFIXES, hidden, read_image, walk
from zoo.data.loader import BATCH_NAMES
from zoo.data.video import VIDEO_SUFFIXES, FrameFiles, VideoFile, in_order
from zoo.errors import ConfigError, DataError
from zoo.prediction import series
from zoo.prediction.predictor import Predictor
from zoo.tasks import (
    AnomalyDetection,
    Forecasting,
    ImageRestoration,
    Imputation,
    LanguageModelling,
    MaskedLanguageModelling,
)
from zoo.training.checks import reading

Row = dict[str, Any]
Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """How answers are made.

    Attributes:
      top: classes that are named for an input.
      steps: tokens to continue a text with.
      folder: where pictures and restored images go; None: nowhere, and images are refused.
      column: of texts in a CSV file.
      seed: of sampling; None: the most likely token.
      table: fields of `zoo.data.series.Table` for CSV files of series.
    """

    top: int = 5
    steps: int = 40
    folder: Path | None = None
    column: str = "text"
    seed: int | None = None
    table: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def answers(
    predictor: Predictor, inputs: Iterable[str | os.PathLike], options: Options | None = None
) -> Iterator[Row]:
    """Rows of answers for files, folders, texts (`-`: a line each of the standard input).

    Args:
      predictor: of a run or a published checkpoint.
      inputs: images, folders of images, videos, CSV files, texts, or .npz files of a batch.
      options: how.

    Raises:
      DataError: for an input that cannot be read or does not fit.
    """
    options = options or Options()
    task, kind = predictor.task, next(iter(predictor.inputs))
    arrays: list[str] = []

    def others() -> Iterator[str]:
        for one in _lines(inputs):
            if one.endswith(".npz"):
                arrays.append(one)
            else:
                yield one

    yield from _by_kind(predictor, others(), options, task, kind)
    for file in arrays:
        yield from _of_arrays(predictor, file, options)


def _by_kind(
    predictor: Predictor, inputs: Iterator[str], options: Options, task: Any, kind: str
) -> Iterator[Row]:
    """Answers for inputs that are no arrays; they are read as they are asked for."""
    if isinstance(task, ImageRestoration):
        yield from _restored(predictor, inputs, options)
    elif isinstance(task, Forecasting | AnomalyDetection | Imputation):
        for file in _files(inputs, (".csv", ".zip", ".gz", ".tsv", ".txt")):
            yield from series.answers(predictor, file, options.folder, options.table)
    elif kind == "images":
        yield from _batched(predictor, _image_examples(predictor, inputs), options)
    elif kind == "clips":
        yield from _batched(predictor, _clip_examples(inputs), options)
    elif kind == "tokens" and isinstance(task, LanguageModelling):
        yield from _continued(predictor, inputs, options)
    elif kind == "tokens":
        yield from _batched(predictor, _text_examples(predictor, inputs, options), options, _cut)
    elif (first := next(inputs, None)) is not None:
        names = ", ".join(predictor.inputs)
        raise ConfigError(
            f"There is no way from {first!r} to the inputs of this network ({names}); "
            "give them as arrays of these names in a .npz file."
        )


def held_out_answers(
    run: str | os.PathLike,
    step: int | None = None,
    changes: Mapping[str, str] | None = None,
    options: Options | None = None,
) -> Iterator[Row]:
    """Answers for the held-out examples of a run, in order, beside what is true of them.

    Raises:
      ConfigError: if the run's data is not there.
    """
    from zoo.evaluators.evaluator import predictions
    from zoo.prediction.predictor import of_run
    from zoo.training.evaluation import open_run

    options = options or Options()
    program, variables, _ = open_run(run, step, changes=changes)
    predictor, data, number = of_run(run, step, changes), program.config.data, 0
    table = getattr(data.eval, "table", None)
    with program.context():
        for batch, said in predictions(program, variables, data):
            for i in range(len(batch["valid"])):
                one = {name: np.asarray(x)[i] for name, x in said.items()}
                names: dict[str, Any] = {"example": number}
                files = getattr(data.eval, "files", None)
                if files is not None:
                    names["input"] = str(files[number][0])
                if "labels" in batch and np.ndim(batch["labels"][i]) == 0:
                    names["true"] = _class_name(predictor, int(batch["labels"][i]))
                if table is not None and "forecast" in one:
                    yield from series.of_window(names, data.eval, number, one["forecast"])
                else:
                    yield names | _row(predictor, one, options)
                number += 1


def predict_held_out(
    run: str | os.PathLike, step: int | None, changes: Mapping[str, str] | None, target: str
) -> int:
    """Write the answers for a run's held-out examples to a CSV, JSON or JSON lines file."""
    from zoo.prediction.outputs import write

    return write(held_out_answers(run, step, changes), target)


# ---------------------------------------------------------------------------- inputs


def _lines(inputs: Iterable[str | os.PathLike]) -> Iterator[str]:
    for one in inputs:
        if os.fspath(one) == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield os.fspath(one)


def _files(inputs: Iterable[str], suffixes: Sequence[str]) -> Iterator[Path]:
    """Files of these endings: those that are named, and those in folders that are named."""
    for one in inputs:
        path = Path(one)
        if path.is_dir():
            found = [f for f in walk(path) if f.suffix.lower() in suffixes]
            if not found:
                raise DataError(f"{one!r} holds no files that end in {', '.join(suffixes[:5])}.")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise DataError(f"There is no file or folder {one!r}.")


def _image_examples(predictor: Predictor, inputs: Iterable[str]) -> Iterator[tuple[str, Example]]:
    channels = 1 if predictor.inputs["images"].shape[-1] == 1 else 3
    white = predictor.source.get("white")
    for file in _files(inputs, IMAGE_SUFFIXES + FOREIGN):
        with reading(str(file)):
            yield str(file), {"image": read_image(file, channels, white)}


def _clip_examples(inputs: Iterable[str]) -> Iterator[tuple[str, Example]]:
    """Videos: files, folders of frame images, and folders of both."""
    for one in inputs:
        path = Path(one)
        if not path.exists():
            raise DataError(f"There is no file or folder {one!r}.")
        with reading(one):
            if path.is_file():
                yield one, {"clip": VideoFile(path)}
                continue
            inner = sorted(p for p in path.iterdir() if not hidden(p.name))
            frames = [p for p in inner if p.suffix.lower() in IMAGE_SUFFIXES]
            if frames:
                yield one, {"clip": FrameFiles(tuple(sorted(frames, key=in_order)))}
            for other in inner:
                if other.suffix.lower() in VIDEO_SUFFIXES:
                    yield str(other), {"clip": VideoFile(other)}
                elif other.is_dir():
                    yield from _clip_examples([str(other)])


def _texts(inputs: Iterable[str], column: str) -> Iterator[str]:
    """Texts: of a column of CSV files, of the lines of .txt files, or the inputs themselves."""
    for one in inputs:
        path = Path(one) if len(one) < 250 else None
        if path is None or not path.exists():
            if one.endswith((".csv", ".txt")):
                raise DataError(f"There is no file {one!r}.")
            yield one
            continue
        for file in _files([one], (".csv", ".txt")):
            with reading(str(file)):
                if file.suffix.lower() == ".csv":
                    from zoo.data.text import TextTable

                    table = TextTable(file, column, None)
                    yield from (table[i]["text"] for i in range(len(table)))
                else:
                    try:
                        lines = file.read_text(encoding="utf-8-sig").splitlines()
                    except UnicodeDecodeError:
                        raise DataError(f"{str(file)!r} is no text in UTF-8.") from None
                    yield from (line for line in lines if line.strip())


def _text_examples(
    predictor: Predictor, inputs: Iterable[str], options: Options
) -> Iterator[tuple[str, Example]]:
    if predictor.tokenizer is None:
        raise ConfigError("Texts need a tokenizer: give --tokenizer FILE (tokenizer.json).")
    own = any(hasattr(t, "tokenizer") for t in predictor.transforms)
    length = predictor.tokenizer.max_length
    for text in _texts(inputs, options.column):
        if own:
            yield text, {"text": text}
            continue
        encoded = predictor.tokenizer([text], pad_to=length)
        full = encoded["mask"].all()  # else nothing was cut, and need not be counted again
        if full and predictor.tokenizer.library.encode(text).overflowing:
            print(f"{text[:40]!r} is longer than {length} tokens, which are read.", file=sys.stderr)
        names = predictor.inputs
        yield text, {name: x[0, :length] for name, x in encoded.items() if name in names}


# ---------------------------------------------------------------------------- answers


def _cut(predictor: Predictor, batch: Example) -> Example:
    """Texts without most of the padding that all have, where a model takes any length."""
    network, own = predictor.network, any(hasattr(t, "tokenizer") for t in predictor.transforms)
    if own or "mask" not in batch or hasattr(network, "any_length"):
        return batch
    if "length" not in inspect.signature(network.example_inputs).parameters:
        return batch
    longest = int(batch["mask"].any(0).nonzero()[0].max(initial=0)) + 1
    length = max(16, 1 << (longest - 1).bit_length())
    return {key: x[:, :length] if x.ndim > 1 else x for key, x in batch.items()}


def _batched(
    predictor: Predictor,
    examples: Iterator[tuple[str, Example]],
    options: Options,
    change: Callable[[Predictor, Example], Example] | None = None,
) -> Iterator[Row]:
    """Rows of examples, a batch at a time; batches are filled up, so that one is compiled."""
    rng = np.random.default_rng(0)

    def transformed(one: tuple[str, Example]) -> tuple[str, Example]:
        name, example = one
        with reading(name):
            for transform in predictor.transforms:
                example = transform(example, rng)
        drop = ("label", "target")
        return name, {k: np.asarray(v) for k, v in example.items() if k not in drop}

    while part := list(islice(examples, predictor.batch_size)):
        part = [transformed(one) for one in part]
        batch = {}
        for key in part[0][1]:
            arrays = [example[key] for _, example in part]
            if len({x.shape for x in arrays}) > 1:
                raise DataError(
                    f"{part[0][0]!r} and others differ in shape ({arrays[0].shape}); the run's "
                    "transforms must make inputs equally large (Resize)."
                )
            arrays += arrays[-1:] * (predictor.batch_size - len(arrays))
            batch[BATCH_NAMES.get(key, key)] = np.stack(arrays)
        batch["valid"] = np.arange(predictor.batch_size) < len(part)
        said = predictor(change(predictor, batch) if change else batch)
        for i, (name, _) in enumerate(part):
            one = {key: np.asarray(x)[i] for key, x in said.items()}
            yield {"input": name, **_row(predictor, one, options)}


def _of_arrays(predictor: Predictor, file: str, options: Options) -> Iterator[Row]:
    """Answers for the examples of a .npz file, whose arrays have the names of a batch."""
    if not Path(file).is_file():
        raise DataError(f"There is no file {file!r}.")
    with reading(file), np.load(file, allow_pickle=False) as stored:
        batch = {BATCH_NAMES.get(name, name): stored[name] for name in stored.files}
    counts = {name: len(x) for name, x in batch.items() if np.ndim(x)}
    if len(set(counts.values())) != 1:
        raise DataError(f"The arrays of {file!r} need one length, not {counts}.")
    count = next(iter(counts.values()))
    batch.setdefault("valid", np.ones(count, bool))
    for start in range(0, count, predictor.batch_size):
        rows = slice(start, start + predictor.batch_size)
        said = predictor({name: x[rows] for name, x in batch.items()})
        for i in range(min(predictor.batch_size, count - start)):
            one = {key: np.asarray(x)[i] for key, x in said.items()}
            yield {"input": f"{file}[{start + i}]", **_row(predictor, one, options)}


def _row(predictor: Predictor, said: Mapping[str, np.ndarray], options: Options) -> Row:
    """One example's answer: labels with probabilities, or the numbers themselves."""
    if "probabilities" in said and said["probabilities"].ndim == 1:
        probabilities = said["probabilities"]
        if not np.isfinite(probabilities).all():
            raise ConfigError(
                "The probabilities are no numbers (NaN): the input or the weights hold some that "
                "are none, or too large ones."
            )
        order = np.argsort(-probabilities, kind="stable")[: options.top]
        named = [_class_name(predictor, int(i)) for i in order]
        row: Row = {"label": named[0], "probability": float(probabilities[order[0]])}
        for place, (name, i) in enumerate(zip(named[1:], order[1:], strict=True), 2):
            row |= {f"label{place}": name, f"probability{place}": float(probabilities[i])}
        return row
    if isinstance(predictor.task, MaskedLanguageModelling) and predictor.tokenizer is not None:
        return {"text": predictor.tokenizer.library.decode(said["tokens"].tolist())}
    return {
        name: x.item() if np.ndim(x) == 0 else np.asarray(x).tolist() for name, x in said.items()
    }


def _class_name(predictor: Predictor, number: int) -> str | int:
    names = predictor.facts.get("classes") or ()
    return names[number] if number < len(names) else number


def _continued(predictor: Predictor, inputs: Iterable[str], options: Options) -> Iterator[Row]:
    """Continuations of texts, or of token numbers where there is no tokenizer."""
    import jax

    from zoo.inference import generate

    tokenizer = predictor.tokenizer
    most = getattr(predictor.network, "max_positions", None)
    most = most or getattr(predictor.network, "max_length", None)
    sampler: dict[str, Callable] = {}
    stop = {"stop": predictor.stops} if predictor.stops else {}
    if options.seed is not None:
        from zoo.inference.samplers import Draw

        sampler = {"sampler": Draw()}
    for text in _texts(inputs, options.column):
        if tokenizer is not None:
            ids = _prompt(tokenizer.library, text, bool(predictor.source))
        else:
            words = text.replace(",", " ").split()
            if not all(word.isdecimal() for word in words):
                raise ConfigError(
                    f"{text[:40]!r} is a text; give --tokenizer FILE (tokenizer.json), or numbers "
                    "of tokens."
                )
            ids = [int(word) for word in words]
        if not ids:
            raise DataError(f"{text!r} has no tokens to continue.")
        if most is not None and len(ids) > (room := max(1, most - options.steps)):
            print(f"{text[:40]!r} has {len(ids)} tokens; the last {room} are read, which leaves "
                  f"room for --steps {options.steps}.", file=sys.stderr)  # fmt: skip
            ids = ids[-room:]
        with reading(text[:40]):
            new = generate(
                predictor.network, predictor.variables, np.array([ids], np.int32),
                steps=options.steps, rng=jax.random.key(options.seed or 0), **stop, **sampler,
            )  # fmt: skip
        new = np.asarray(new)[0].tolist()
        new = new[len(ids) :] if len(new) > options.steps else new
        ends = [i for i, token in enumerate(new) if token in predictor.stops]
        new = new[: ends[0]] if ends else new
        said = tokenizer.library.decode(new) if tokenizer is not None else new
        yield {"input": text, "continuation": said}


def _prompt(library: Any, text: str, of_run: bool) -> list[int]:
    """A text's tokens; of a published file behind what its tokenizer puts in front of texts."""
    plain = library.encode(text, add_special_tokens=False).ids
    whole = library.encode(text).ids
    return whole if not of_run and whole[len(whole) - len(plain) :] == plain else plain


def _restored(predictor: Predictor, inputs: Iterable[str], options: Options) -> Iterator[Row]:
    """Restored images, written as PNG files; those larger than a tile go tile by tile."""
    import jax
    from PIL import Image

    from zoo.inference.tiles import in_tiles

    if options.folder is None:
        raise ConfigError("Restored images are files: give --out FOLDER to write them to.")
    options.folder.mkdir(parents=True, exist_ok=True)
    example = predictor.inputs["images"]
    shapes = {"images": jax.ShapeDtypeStruct(example.shape, np.float32)}
    with predictor.context():
        out = jax.eval_shape(predictor.predict, predictor.variables, shapes)["image"]
    scale, align = out.shape[1] // example.shape[1], getattr(predictor.network, "window_size", 1)
    align = int(align) if isinstance(align, int) else 16

    def run(images: Any) -> Any:
        return predictor.predict(predictor.variables, {"images": images})["image"]

    for file in _files(inputs, IMAGE_SUFFIXES + FOREIGN):
        with reading(str(file)):
            image = read_image(file, channels=example.shape[-1]).astype(np.float32) / 255
            tile = max(64 // align, 1) * align
            overlap = max(16 // align, 1) * align
            with predictor.context():
                restored = in_tiles(
                    run, image[None], scale=scale, tile=tile, overlap=overlap, align=align
                )
        pixels = np.round(np.asarray(restored[0]).clip(0, 1) * 255).astype(np.uint8)
        target = options.folder / f"{file.stem}.restored.png"
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(target)
        yield {"input": str(file), "written": str(target),
               "height": pixels.shape[0], "width": pixels.shape[1]}  # fmt: skip
