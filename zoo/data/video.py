"""Clips: folders of videos, sampling of frames, windows over long videos.

A video example is `{"clip": frames, "label": int}`, where `frames` is a lazy sequence of uint8
images `[height, width, 3]` (or an array) until `SampleClip` reads those that are wanted.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.images import IMAGE_SUFFIXES, hidden, read_image

Example = dict[str, Any]
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")


@dataclass(frozen=True)
class FrameFiles:
    """A video that is a folder of image files, one a frame, in the order of their numbers."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """These frames, `uint8 [frames, height, width, 3]`."""
        return np.stack([read_image(self.files[index]) for index in indices])


@dataclass(frozen=True)
class VideoFile:
    """A video file, decoded with PyAV (`pip install av`) when frames are read.

    Raises:
      ModuleNotFoundError: if PyAV is not installed.
      ValueError: if the file holds no video.
    """

    path: Path

    def __post_init__(self):
        try:
            import av  # noqa: F401
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{str(self.path)!r} is a video file, which needs PyAV: pip install av. Folders of "
                "frames need nothing more."
            ) from None

    def _decoded(self) -> Iterator[np.ndarray]:
        import av

        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
        except (av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"{str(self.path)!r} is not a readable video: {error}.") from None

    @functools.cached_property
    def _length(self) -> int:
        return sum(1 for _ in self._decoded())

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """These frames, `uint8 [frames, height, width, 3]`; the file is decoded from its start."""
        wanted, found = set(indices), {}
        for at, frame in enumerate(self._decoded()):
            if at in wanted:
                found[at] = frame
                if len(found) == len(wanted):
                    break
        return np.stack([found[index] for index in indices])


@dataclass(frozen=True)
class ClipFolder:
    """A folder with one folder per class; in it, videos: files, or folders of frame images.

    The folder is looked at when examples are asked for, so that a config file can name one.

    Raises:
      FileNotFoundError: then, if there is no such folder, or no video in it.
    """

    path: str | Path
    names: tuple[str, ...] | None = None
    """Of the classes, by number; None: those of the folders, sorted."""

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        folders = (p for p in Path(self.path).iterdir() if p.is_dir() and not hidden(p.name))
        found = tuple(sorted(p.name for p in folders))
        if unknown := [n for n in found if self.names is not None and n not in self.names]:
            raise ValueError(
                f"{str(self.path)!r} has a folder {unknown[0]!r}, which is none of the classes "
                f"{', '.join(self.names or ())}."
            )
        return found if self.names is None else self.names

    def numbered_as(self, classes: Sequence[str]) -> "ClipFolder":
        """The same folder with the numbers of other classes, of which it may lack some."""
        return ClipFolder(self.path, tuple(classes))

    @property
    def labels(self) -> np.ndarray:
        """The number of the class of each video."""
        return np.array([label for _, label in self.videos], np.int32)

    @functools.cached_property
    def videos(self) -> tuple[tuple[Any, int], ...]:
        """All videos with the number of their class."""
        if not Path(self.path).is_dir():
            raise FileNotFoundError(f"There is no folder {str(self.path)!r} to read videos from.")
        found = []
        for label, name in enumerate(self.classes):
            folder = Path(self.path) / name
            for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
                if hidden(entry.name):
                    continue
                if entry.suffix.lower() in VIDEO_SUFFIXES:
                    found.append((VideoFile(entry), label))
                elif entry.is_dir():
                    files = sorted((f for f in entry.iterdir() if _is_frame(f)), key=in_order)
                    found += [(FrameFiles(tuple(files)), label)] if files else []
        if not found:
            raise FileNotFoundError(
                f"{str(self.path)!r} holds no videos; expected one folder per class, in it folders "
                f"of frame images, or files that end in {', '.join(VIDEO_SUFFIXES)}."
            )
        return tuple(found)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Example:
        clip, label = self.videos[index]
        return {"clip": clip, "label": label}


def in_order(file: Path) -> list[tuple[int, str]]:
    """A key that sorts names with numbers as people count: frame2 before frame10."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _is_frame(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden(file.name)


def read_frames(clip: Any, indices: Sequence[int]) -> np.ndarray:
    """Frames of a lazy video or of an array."""
    return clip.read(indices) if hasattr(clip, "read") else np.asarray(clip)[np.asarray(indices)]


@dataclass(frozen=True)
class SampleClip:
    """`frames` frames, every `stride`-th, from a random place, or from the middle.

    A video that is too short is repeated from its start, as the official test pipeline does.
    """

    frames: int
    stride: int = 1
    random: bool = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        length, span = len(example["clip"]), (self.frames - 1) * self.stride + 1
        if not length:
            raise ValueError(f"{example['clip']!r} has no frames.")
        room = max(length - span, 0)
        start = int(rng.integers(room + 1)) if self.random else room // 2
        indices = (start + np.arange(self.frames) * self.stride) % length
        return {**example, "clip": read_frames(example["clip"], indices.tolist())}


@dataclass(frozen=True)
class EachFrame:
    """An image transform on every frame of a clip, with the same random draws for all of them."""

    transform: Callable

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transform one example."""
        frames = []
        for frame in example["clip"]:
            drawing = copy.deepcopy(rng)
            frames.append(self.transform({"image": frame}, drawing)["image"])
        rng.bit_generator.state = drawing.bit_generator.state
        return {**example, "clip": np.stack(frames)}


def clip_windows(length: int, frames: int, stride: int = 1, step: int | None = None) -> np.ndarray:
    """Frame numbers of windows that slide over a long video, `[windows, frames]`.

    Args:
      length: frames of the video; one that is shorter than a window is repeated.
      frames: of a window.
      stride: between the frames of a window.
      step: frames between the starts of windows; None is a whole window, without overlap. The
        last window ends with the video.

    Raises:
      ValueError: for an empty video.
    """
    if length < 1:
        raise ValueError("A video without frames has no windows.")
    span = (frames - 1) * stride + 1
    last = max(length - span, 0)
    starts = np.unique(np.append(np.arange(0, last + 1, step or span), last))
    return (starts[:, None] + np.arange(frames) * stride) % length


def slide(
    predict: Callable[[np.ndarray], np.ndarray],
    video: Any,
    frames: int,
    stride: int = 1,
    step: int | None = None,
    transforms: Sequence[Callable] = (),
    batch_size: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities of every window of a long video, holding one batch of windows at a time.

    Args:
      predict: a batch of clips to `[batch, classes]`, e.g. a jitted `task.predict`; batches are
        filled up, so that it is compiled once.
      video: a lazy video or an array of frames.
      frames: of a window; with `stride` and `step` as in `clip_windows`.
      stride: between the frames of a window.
      step: frames between the starts of windows.
      transforms: evaluation transforms behind the sampling, as in a config.
      batch_size: windows at a time.

    Returns:
      `[windows, classes]` and the number of each window's first frame. Their mean over windows is
      the prediction for the whole video.
    """
    windows = clip_windows(len(video), frames, stride, step)
    rng, outputs = np.random.default_rng(0), []
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        clips = []
        for indices in part:
            example = {"clip": read_frames(video, indices.tolist())}
            for transform in transforms:
                example = transform(example, rng)
            clips.append(example["clip"])
        clips += [clips[-1]] * (batch_size - len(clips))
        outputs.append(np.asarray(predict(np.stack(clips)))[: len(part)])
    return np.concatenate(outputs), windows[:, 0]
