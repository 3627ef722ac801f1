"""Motion-capture clips that come with the package pybullet (zlib licence), as rows of motion.

Files `humanoid3d_*.txt` are JSON: a `Frames` list of 44 numbers, and a file's name is all that is
said of what is done in it:

    1   seconds        3   place of the root          4   its rotation, a quaternion (w, x, y, z)
    4   chest, neck;   4, 1, 4   hip, knee, ankle of the right;   4, 1   shoulder, elbow;
    the same of the left

There x is forward and z to the right. Elbows and knees turn about z.
"""

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from zoo.data.gaits import RATE, window_with_a_gap
from zoo.motion.matching import Clip
from zoo.motion.skeleton import CONTACTS, MOVES, Skeleton, from_quaternion, rows_from_rotations

HUMANOID = Skeleton(
    ("root", "chest", "neck", "right_hip", "right_knee", "right_ankle", "right_shoulder",
     "right_elbow", "left_hip", "left_knee", "left_ankle", "left_shoulder", "left_elbow"),
    (-1, 0, 1, 0, 3, 4, 1, 6, 0, 8, 9, 1, 11),
    ((0, 0, 0), (0, 0.236151, 0), (0, 0.223894, 0),
     (-0.084887, 0, 0), (0, -0.421546, 0), (0, -0.409870, 0),
     (-0.183110, 0.243500, -0.024050), (0, -0.274788, 0),
     (0.084887, 0, 0), (0, -0.421546, 0), (0, -0.409870, 0),
     (0.183110, 0.243500, -0.024050), (0, -0.274788, 0)),
    (10, 5),
    0.06,
)  # fmt: skip
"""The body of the clips, in our directions: z forward, x to the left."""

WIDTHS = (4, 4, 4, 4, 1, 4, 4, 1, 4, 1, 4, 4, 1)
"""Numbers of each joint's rotation."""
AXES = np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])
"""From their directions to ours."""


def read_clip(path: str | Path, rate: float = 30.0) -> Clip:
    """One file as a clip of the body `HUMANOID`, at our rate.

    Raises:
      ValueError: if the file is none of this form.
    """
    path = Path(path)
    try:
        frames = np.asarray(json.loads(path.read_text())["Frames"], float)
        if frames.ndim != 2 or frames.shape[1] != 44:
            raise ValueError(f"it has rows of {frames.shape[1:]} numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name} is no clip of a humanoid ({error}); its Frames must have 44 numbers each."
        ) from None
    joint, at = [], 4
    for width in WIDTHS:
        numbers = frames[:, at : at + width]
        if width == 1:
            half, zero = numbers[:, 0] / 2, np.zeros(len(frames))
            numbers = np.stack([np.cos(half), zero, zero, np.sin(half)], 1)
        joint.append(numbers)
        at += width
    time = np.concatenate([[0.0], np.cumsum(frames[:-1, 0])])
    wanted = np.arange(0, time[-1] + 1e-9, 1 / rate)
    quaternions = np.stack([_resampled(q, time, wanted) for q in joint], 1)
    matrix = AXES @ from_quaternion(quaternions) @ AXES.T
    root = np.stack([np.interp(wanted, time, frames[:, 1 + i]) for i in range(3)], 1) @ AXES.T
    words = re.sub(r"^humanoid3d_|\d+", "", path.stem).replace("_", " ")
    return Clip(f"a person does {words.strip()}", rows_from_rotations(HUMANOID, matrix, root, rate))


def _resampled(
    q: Float[np.ndarray, "frames 4"], time: np.ndarray, wanted: np.ndarray
) -> Float[np.ndarray, "wanted 4"]:
    """Quaternions at other times: on the line between neighbours of the same sign."""
    flips = np.cumprod(np.where((q[1:] * q[:-1]).sum(1) < 0, -1.0, 1.0))
    q = q * np.concatenate([[1.0], flips])[:, None]
    q = np.stack([np.interp(wanted, time, q[:, i]) for i in range(4)], 1)
    return q / np.linalg.norm(q, axis=1, keepdims=True)


def packaged_clips(
    names: Sequence[str] = ("walk", "run", "jump", "kick", "punch"), rate: float = 30.0
) -> list[Clip]:
    """Clips of the installed package, by the words in the names of their files, at a rate.

    Raises:
      FileNotFoundError: if the package is not installed.
      ValueError: for a name that it does not have.
    """
    spec = importlib.util.find_spec("pybullet_data")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The motion-capture clips come with the package pybullet: pip install pybullet. "
            "zoo.data.gaits makes clips without it."
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "motions"
    found = {p.stem.removeprefix("humanoid3d_"): p for p in folder.glob("humanoid3d_*.txt")}
    for name in names:
        if name not in found:
            raise ValueError(f"There is no clip {name!r}; there are {', '.join(sorted(found))}.")
    return [read_clip(found[name], rate) for name in names]


def mirrored(
    rows: Float[np.ndarray, "frames numbers"], body: Skeleton = HUMANOID
) -> Float[np.ndarray, "frames numbers"]:
    """The motion that a mirror at the character's side shows: left is right.

    Args:
      rows: of a motion.
      body: whose joints `left_...` and `right_...` are mirror images.
    """
    other = {"left": "right", "right": "left"}
    names = [re.sub("^(left|right)", lambda side: other[side[0]], name) for name in body.names]
    order = [body.names.index(name) for name in names]
    six, moves, contacts = np.split(rows, [-MOVES - CONTACTS, -CONTACTS], axis=1)
    six = six.reshape(len(rows), -1, 6)[:, order] * np.array([1, -1, -1, -1, 1, 1])
    moves = moves * np.array([-1, 1, -1, 1])
    parts = six.reshape(len(rows), -1), moves, contacts[:, ::-1]
    return np.concatenate(parts, 1).astype(np.float32)


CLIPS = ("backflip", "cartwheel", "crawl", "dance_a", "dance_b", "getup_facedown", "getup_faceup",
         "jump", "kick", "punch", "roll", "spin", "spinkick", "walk")  # fmt: skip
"""Packaged clips of more than a second."""


@dataclass(frozen=True)
class CaptureWindows:
    """Windows of the packaged clips, with a gap in each; see `zoo.data.gaits.GaitWindows`.

    Attributes:
      count: examples.
      names: of the clips.
      length: frames.
      gap: smallest and largest number of unknown frames.
      speeds: at which clips are played, each as often.
      mirror: whether half of the windows show the clip's mirror image.
      seed: other seeds give other windows.
    """

    count: int
    names: tuple[str, ...] = CLIPS
    length: int = 24
    gap: tuple[int, int] = (4, 12)
    speeds: tuple[float, ...] = (1.0,)
    mirror: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    @functools.cached_property
    def clips(self) -> list[Float[np.ndarray, "frames numbers"]]:
        """At all speeds, and their mirror images; those that are too short are left out."""
        clips = []
        for speed in self.speeds:
            for clip in packaged_clips(self.names, RATE / speed):
                rows = clip.rows.copy()
                rows[:, -MOVES - CONTACTS : -MOVES - CONTACTS + 3] *= speed
                clips += [rows, mirrored(rows)] if self.mirror else [rows]
        return [rows for rows in clips if len(rows) >= self.length]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        clip = self.clips[int(rng.integers(len(self.clips)))]
        return window_with_a_gap(clip, self.length, self.gap, rng)
