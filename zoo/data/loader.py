"""From sources to batches: grain pipelines whose order depends on seed and step alone.

Training: examples are shuffled anew each epoch and never dropped; the stream of examples is cut
into global batches, of which each process reads its contiguous share. What an example becomes
(order, augmentation, mixing) is a function of the seed and its place in the stream, so the number
of processes does not change it.

Evaluation: every example once, in order; the last batch is padded and `valid` says what counts.
"""

import collections
import concurrent.futures
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

Example = dict[str, Any]
BATCH_NAMES = {"image": "images", "clip": "clips", "label": "labels", "text": "texts"}


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Example:
        """One of them."""


@dataclass(frozen=True)
class Data:
    """What a config says of its data.

    Attributes:
      train: examples to learn from, shuffled; one that has `ordered = True` is not (a curriculum).
      eval: held-out examples.
      train_transforms: applied in order to each training example, `f(example, rng) -> example`.
      eval_transforms: the same for held-out ones; an example meets the same `rng` each time.
      pair_transforms: applied to pairs of training examples (arrays with a leading 2), such as
        `MixPairs`; the batch must then be even on each process.
      batch_size: training examples a step, over all processes.
      eval_batch_size: held-out examples a step, over all processes; None is `batch_size`.
      repeats: copies of each training example in a row of the stream, each transformed anew
        (repeated augmentation, Hoffer et al., arXiv 1901.09335; DeiT: 3); an epoch is that longer.
      threads: threads that read and transform ahead, per process.
      test: examples by which nothing is chosen, measured once, at the end.
    """

    train: Source
    eval: Source
    train_transforms: tuple[Callable, ...] = ()
    eval_transforms: tuple[Callable, ...] = ()
    pair_transforms: tuple[Callable, ...] = ()
    batch_size: int = 64
    eval_batch_size: int | None = None
    repeats: int = 1
    threads: int = 2
    test: Source | None = None

    def __post_init__(self) -> None:
        """Number the classes of held-out folders and tables as the training source has them.

        Raises:
          ValueError: for what is no source of examples.
        """
        for name in ("train", "eval", "test"):
            source = getattr(self, name)
            if isinstance(source, str | os.PathLike | dict) or (source is None and name != "test"):
                raise ValueError(
                    f"Data.{name} is {source!r}, which is no source of examples; give one of "
                    "zoo.data, such as ImageFolder(PATH), Arrays(image=..., label=...) or a list."
                )
        classes = _classes(self.train)
        for name in ("eval", "test"):
            source = getattr(self, name)
            if (
                classes
                and hasattr(source, "numbered_as")
                and _classes(source) not in (None, classes)
            ):
                object.__setattr__(self, name, source.numbered_as(classes))


def _classes(source: Any) -> tuple[str, ...] | None:
    """Names of a source's classes, if it has any and is there."""
    try:
        return getattr(source, "classes", None)
    except OSError:
        return None


class _Repeated(grain.MapDataset):
    """Every element `count` times, its copies 32 apart, so that neighbours differ (mixing)."""

    def __init__(self, parent: grain.MapDataset, count: int):
        super().__init__(parent)
        self.count = count

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        block, within = divmod(index, 32 * self.count)
        return self._parent[32 * block + within % 32]


class _Share(grain.MapDataset):
    """The contiguous share of one process in every group of `group` elements."""

    def __init__(self, parent: grain.MapDataset, group: int, index: int, count: int, start: int):
        super().__init__(parent)
        self.group, self.share = group, group // count
        self.first = start + index * self.share

    def __len__(self) -> int:
        return len(self._parent) // self.group * self.share

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, offset = divmod(index, self.share)
        return self._parent[step * self.group + self.first + offset]


def train_iterator(
    data: Data, seed: int, process_index: int = 0, process_count: int = 1, start: int = 0
) -> grain.DatasetIterator:
    """Endless batches of this process; `get_state()` and `set_state(s)` make it resumable.

    Args:
      data: what is read.
      seed: of order and augmentation.
      process_index: which process this is.
      process_count: of so many.
      start: examples of the stream, over all processes, that come before the first batch: a run
        that goes on with another batch size neither repeats nor leaves out any.

    Raises:
      ValueError: if the processes (and pairs) do not divide the batch, or there are no examples.
    """
    local = _local_size("batch_size", data.batch_size, process_count)
    if len(data.train) == 0:
        raise ValueError(f"{data.train!r} has no examples to train on.")
    stream = grain.MapDataset.source(data.train).seed(seed)
    stream = (stream if getattr(data.train, "ordered", False) else stream.shuffle()).repeat()
    if data.repeats > 1:
        stream = _Repeated(stream, data.repeats)
    if data.train_transforms:
        stream = stream.random_map(_compose(data.train_transforms))
    group = data.batch_size
    if data.pair_transforms:
        if local % 2:
            raise ValueError(
                f"Mixing pairs needs an even number of examples per process, not {local}: change "
                f"batch_size={data.batch_size}."
            )
        stream = stream.batch(2, batch_fn=_stack).random_map(_compose(data.pair_transforms))
        group //= 2
        start //= 2
    share = _Share(stream, group, process_index, process_count, start)
    joined = _join if data.pair_transforms else _collate
    batches = share.batch(group // process_count, batch_fn=joined)
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads)
    return iter(batches.to_iter_dataset(options))


def eval_batches(
    data: Data, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every held-out example once, in order; batches have `valid [batch]` (False is padding).

    All processes get equally many batches.

    Raises:
      ValueError: if the processes do not divide the batch, or there are no examples.
    """
    size = data.eval_batch_size or data.batch_size
    local = _local_size("eval_batch_size", size, process_count)
    total = len(data.eval)
    if total == 0:
        raise ValueError(f"{data.eval!r} has no examples to evaluate on.")
    transform = _compose(data.eval_transforms)

    def read(index: int) -> Example:
        return transform(data.eval[index], np.random.default_rng(index))

    starts = range(process_index * local, total + process_index * local, size)
    ahead: collections.deque = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(max(1, data.threads), "evaluation")
    try:
        for start in (*starts, None, None):
            if start is not None:
                # of a process that has only padding in the last batch, the first example
                indices = [i for i in range(start, start + local) if i < total] or [0]
                valid = np.arange(start, start + local) < total
                ahead.append(([pool.submit(read, i) for i in indices], valid))
            if ahead and (start is None or len(ahead) > 2):
                futures, valid = ahead.popleft()
                examples = [future.result() for future in futures]
                examples += examples[:1] * (local - len(examples))
                yield {**_collate(examples), "valid": valid}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def example_batch(data: Data) -> dict[str, np.ndarray]:
    """Two training examples as a batch, for its names, types and shapes.

    A source that has `example()` is not read: that gives what its examples look like.
    """
    rng = np.random.default_rng(0)
    if not hasattr(data.train, "example") and not len(data.train):
        raise ValueError(f"{data.train!r} has no examples to train on.")
    example = data.train.example() if hasattr(data.train, "example") else data.train[0]
    transform = _compose(data.train_transforms)
    examples = [transform(dict(example), rng) for _ in range(2)]
    if data.pair_transforms:
        return _join([_compose(data.pair_transforms)(_stack(examples), rng)])
    return _collate(examples)


def _local_size(name: str, size: int, process_count: int) -> int:
    if size < 1 or size % process_count:
        raise ValueError(
            f"{name}={size} cannot be shared by {process_count} processes; "
            f"choose a multiple of {process_count}."
        )
    return size // process_count


def _compose(transforms: tuple[Callable, ...]) -> Callable[[Example, np.random.Generator], Example]:
    def apply(example: Example, rng: np.random.Generator) -> Example:
        for transform in transforms:
            example = transform(example, rng)
        return example

    return apply


def _stack(examples: list[Example]) -> Example:
    stacked = {}
    for key in examples[0]:
        values = [np.asarray(example[key]) for example in examples]
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise ValueError(
                f"{key!r} has shapes {shapes[0]} and {shapes[1]} in one batch; add a transform "
                "that makes them equal (Resize and CenterCrop for images)."
            )
        stacked[key] = np.stack(values)
    return stacked


def _named(batch: Example) -> dict[str, np.ndarray]:
    """Model argument names, and labels in the 32 bits that JAX keeps."""
    batch = {BATCH_NAMES.get(key, key): value for key, value in batch.items()}
    narrow = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}
    return {key: np.asarray(v, narrow.get(v.dtype, v.dtype)) for key, v in batch.items()}


def _collate(examples: list[Example]) -> dict[str, np.ndarray]:
    return {**_named(_stack(examples)), "valid": np.ones(len(examples), bool)}


def _join(pairs: list[Example]) -> dict[str, np.ndarray]:
    batch = {key: np.concatenate([pair[key] for pair in pairs]) for key in pairs[0]}
    return {**_named(batch), "valid": np.ones(2 * len(pairs), bool)}
