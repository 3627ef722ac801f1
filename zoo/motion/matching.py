"""Motion matching: the frame of a data base of clips that fits a text, a path and a pose best.

    sem(clip)  = 1 - cos(text, caption of the clip)            the K clips with the smallest stay
    kin(frame) = sum_d w_d (z_frame,d - z_query,d)^2           z: features over their deviation

The frame with the smallest kin is played for `duration` frames, then the search is done again. The
last `duration` frames of a clip are no candidates, and neither are frames within `guard` of the
current one. Where nothing is left, the guard is dropped first; then clips are added one by one. Of
equal frames (and clips) the first is taken.

kin is summed as it stands, not as |a|^2 - 2ab + |b|^2: for one query at a time both read the data
base once, and the sum of squares loses no digits.

The features of a frame, in its own directions (metres, metres a second):

    12    where the root is after 10, 20, 30 frames, and where it faces then
    12    places and speeds of both feet
    3     speeds of the root, and its turning
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.motion import skeleton as bodies
from zoo.motion.skeleton import Skeleton, Track

AHEAD = (10, 20, 30)
"""Frames after which a path is compared."""
PATH, POSE = 4 * len(AHEAD), 15
"""Features of the path, and of the pose behind them."""


@dataclass(frozen=True)
class Clip:
    """A captioned motion.

    Attributes:
      caption: what is done in it.
      rows: of the motion, see `zoo.motion.skeleton`.
    """

    caption: str
    rows: Float[np.ndarray, "frames numbers"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "features", "mean", "deviation", "clip", "left", "text"],
    meta_fields=["captions"],
)
@dataclass(frozen=True)
class Database:
    """All frames of all clips, as arrays on the device.

    Attributes:
      rows: of the motions, one clip after the other.
      features: of each frame, over their deviation.
      mean: of the features before that.
      deviation: likewise.
      clip: number of the clip of each frame.
      left: frames of the clip behind each frame, itself included.
      text: of each clip, its caption as numbers.
      captions: of the clips.
    """

    rows: Float[Array, "frames numbers"]
    features: Float[Array, "frames features"]
    mean: Float[Array, "features"]
    deviation: Float[Array, "features"]
    clip: Int[Array, "frames"]
    left: Int[Array, "frames"]
    text: Float[Array, "clips channels"]
    captions: tuple[str, ...]


def standardise(
    features: Float[Array, "frames features"],
) -> tuple[Float[Array, "frames features"], Float[Array, "features"], Float[Array, "features"]]:
    """Features less their mean, over their deviation; the mean and the deviation."""
    mean, deviation = features.mean(0), features.std(0) + 1e-8
    return (features - mean) / deviation, mean, deviation


def frame_features(
    body: Skeleton, rows: Float[np.ndarray, "frames numbers"], rate: float = 30.0
) -> Float[np.ndarray, "frames features"]:
    """The features of each frame of a clip, which goes on behind its end as it does there."""
    rows = np.asarray(rows, np.float64)
    more = np.concatenate([rows, np.repeat(rows[-1:], max(AHEAD), 0)])
    where, count = bodies.track(more, rate), len(rows)
    place, angle = where.place, where.heading
    path = []
    for ahead in AHEAD:
        step = place[ahead : ahead + count] - place[:count]
        path.append(bodies.turned(step, -angle[:count]))
    for ahead in AHEAD:
        path.append(bodies.facing(angle[ahead : ahead + count] - angle[:count]))
    here = Track(place[:count], angle[:count])
    feet = bodies.joints(body, rows, here)[:, list(body.feet)]
    speed = np.diff(feet, axis=0) * rate
    speed = np.concatenate([speed[:1], speed]) if len(speed) else np.zeros_like(feet)

    def local(x: np.ndarray) -> np.ndarray:
        flat = bodies.turned(x[..., [0, 2]], -here.heading[:, None])
        return np.stack([flat[..., 0], x[..., 1], flat[..., 1]], -1).reshape(count, -1)

    root = np.stack([here.place[:, 0], np.zeros(count), here.place[:, 1]], -1)
    moves = bodies.parts(rows)[1][:, :3]
    return np.concatenate([*path, local(feet - root[:, None]), local(speed), moves], 1)


def make_database(
    clips: Sequence[Clip],
    body: Skeleton,
    embed: Callable[[Sequence[str]], np.ndarray],
    duration: int,
    rate: float = 30.0,
) -> Database:
    """A data base of clips.

    Args:
      clips: at least one.
      body: of all of them.
      embed: captions to numbers, see `hashed_words`.
      duration: frames that are played at a time.
      rate: frames a second.

    Raises:
      ValueError: if no clip is longer than `duration`.
    """
    lengths = [len(clip.rows) for clip in clips]
    if not lengths or max(lengths) <= duration:
        raise ValueError(
            f"No clip is longer than duration={duration} frames (they have "
            f"{', '.join(map(str, lengths)) or 'none'}); give longer ones or play fewer frames."
        )
    raw = np.concatenate([frame_features(body, clip.rows, rate) for clip in clips])
    features, mean, deviation = standardise(raw)
    number = np.repeat(np.arange(len(clips)), lengths)
    left = np.concatenate([np.arange(n, 0, -1) for n in lengths])
    captions = tuple(clip.caption for clip in clips)
    return Database(
        jnp.asarray(np.concatenate([clip.rows for clip in clips]), jnp.float32),
        jnp.asarray(features, jnp.float32),
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(deviation, jnp.float32),
        jnp.asarray(number, jnp.int32),
        jnp.asarray(left, jnp.int32),
        jnp.asarray(embed(captions), jnp.float32),
        captions,
    )


class Match(NamedTuple):
    """What a search found.

    Attributes:
      frame: the one to play.
      costs: kin of every frame.
      allowed: whether each frame was a candidate.
    """

    frame: Int[Array, ""]
    costs: Float[Array, "frames"]
    allowed: Bool[Array, "frames"]


def distances(
    text: Float[Array, "channels"], captions: Float[Array, "clips channels"]
) -> Float[Array, "clips"]:
    """1 - cos of a text and each caption."""
    norms = jnp.sqrt((captions**2).sum(-1) * (text**2).sum())
    return 1 - captions @ text / jnp.maximum(norms, jnp.finfo(text.dtype).tiny)


def candidates(
    sem: Float[Array, "clips"],
    clip: Int[Array, "frames"],
    left: Int[Array, "frames"],
    current: Int[Array, ""],
    *,
    keep: int,
    duration: int,
    guard: int,
) -> Bool[Array, "frames"]:
    """Which frames may be played.

    Args:
      sem: distance of each clip.
      clip: number of each frame's clip.
      left: frames of the clip behind each frame, itself included.
      current: the frame that was played last, or -1.
      keep: clips.
      duration: frames that are played; clips must have as many left.
      guard: frames around the current one that may not be played.
    """
    order = jnp.argsort(sem, stable=True)
    rank = jnp.argsort(order, stable=True)[clip]
    long = left > duration
    near = (current >= 0) & (jnp.abs(jnp.arange(len(clip)) - current) <= guard)
    guarded = long & (rank < keep) & ~near
    needed = jnp.min(jnp.where(long, rank, len(sem))) + 1
    free = long & (rank < jnp.maximum(keep, needed))
    return jnp.where(guarded.any(), guarded, free)


def match(
    features: Float[Array, "frames features"],
    query: Float[Array, "features"],
    weights: Float[Array, "features"],
    allowed: Bool[Array, "frames"],
) -> Match:
    """The allowed frame that is nearest to a query."""
    costs = (weights * (features - query) ** 2).sum(-1)
    return Match(jnp.argmin(jnp.where(allowed, costs, jnp.inf)), costs, allowed)


def query_features(
    database: Database,
    current: Int[Array, ""],
    places: Float[Array, "ahead 2"],
    directions: Float[Array, "ahead 2"],
) -> Float[Array, "features"]:
    """A query: the wanted path in the character's directions, and the current frame's pose."""
    path = jnp.concatenate([places.reshape(-1), directions.reshape(-1)])
    path = (path - database.mean[:PATH]) / database.deviation[:PATH]
    return jnp.concatenate([path, database.features[current, PATH:]])


def hashed_words(texts: Sequence[str], channels: int = 64) -> Float[np.ndarray, "texts channels"]:
    """Texts as sums of a vector a word, made from the word alone: needs no trained weights.

    Endings are cut, so that "walks" is near "walking". A sentence encoder (MiniLM, see
    `zoo.models.language.bert`) understands more; pass its function in place of this one.
    """
    import re
    import zlib

    rows: list[Any] = []
    for text in texts:
        row = np.zeros(channels)
        for word in re.findall(r"[a-z]+", text.lower()):
            if word not in COMMON:
                seed = zlib.crc32(stem(word).encode())
                row += np.random.default_rng(seed).standard_normal(channels)
        rows.append(row)
    return np.stack(rows).astype(np.float32)


COMMON = frozenset("a an the and of to in on at by for with is are he she it they then".split())
"""Words that say nothing about a motion."""


def stem(word: str) -> str:
    """A word without its ending: walk of walks and walking, run of running, hurry of hurries."""
    if word.endswith("ies"):
        word = word[:-3] + "y"
    for ending in ("ing", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and (word[-1] == word[-2] or word[-1] == "e") else word
