"""Skeletons: rotations in six numbers, forward kinematics, and rows of a motion.

A motion is `[frames, 6 joints + 6]` numbers that do not change when the character is moved or
turned, so that clips can be joined anywhere:

    6 joints    the first two columns of each joint's rotation; of the root without its heading
    3           how far the root went since the frame before, in the frame before's directions, as
                metres a second to the side and forward, and its turning in radians a second
    1           height of the root
    2           whether the left and the right foot touch the ground

y is up. The heading is an angle about y; at heading 0 a character faces z and its left side is x.
Functions take NumPy arrays or JAX arrays, and give the same kind.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

CONTACT_HEIGHT, CONTACT_SPEED = 0.05, 0.15
"""A foot lower (metres) and slower (metres a second) than this touches the ground."""
MOVES, CONTACTS = 4, 2
"""Numbers of a row behind the rotations: speeds and height; contacts."""


def _library(x: Any) -> Any:
    return np if isinstance(x, np.ndarray | np.generic) else jnp


@dataclass(frozen=True)
class Skeleton:
    """Joints of a body.

    Attributes:
      names: of the joints, the root first.
      parents: number of each joint's parent, which stands before it; -1 for the root.
      offsets: where each joint is in its parent's frame, in metres.
      feet: numbers of the left and the right foot.
      sole: height of a foot's joint above the ground that it stands on.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]
    offsets: tuple[tuple[float, float, float], ...]
    feet: tuple[int, int]
    sole: float = 0.0

    def __post_init__(self):
        if any(parent >= joint for joint, parent in enumerate(self.parents)):
            raise ValueError(f"parents={self.parents}: each parent must stand before its child.")

    @property
    def width(self) -> int:
        """Numbers of a row of motion."""
        return 6 * len(self.names) + MOVES + CONTACTS


HIP, LEG = 0.09, 0.46

WALKER = Skeleton(
    ("hips", "left_hip", "left_knee", "left_foot", "right_hip", "right_knee", "right_foot",
     "chest", "right_shoulder", "right_hand"),
    (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8),
    ((0, 0, 0), (HIP, 0, 0), (0, -LEG, 0), (0, -LEG, 0), (-HIP, 0, 0), (0, -LEG, 0), (0, -LEG, 0),
     (0, 0.45, 0), (-0.18, 0, 0), (0, -0.55, 0)),
    (3, 6),
)  # fmt: skip
"""The body of procedural clips: two legs, a chest and an arm to wave with."""

# --------------------------------------------------------------------------- rotations


def to_matrix(six: Float[Array, "*batch 6"]) -> Float[Array, "*batch 3 3"]:
    """The rotation whose first two columns these are, made orthonormal (Gram and Schmidt)."""
    xp = _library(six)
    first, second = six[..., :3], six[..., 3:]
    first = _unit(first)
    second = _unit(second - (first * second).sum(-1, keepdims=True) * first)
    return xp.stack([first, second, xp.cross(first, second)], -1)


def _unit(x: Array) -> Array:
    xp = _library(x)
    return x / xp.sqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def to_six(matrix: Float[Array, "*batch 3 3"]) -> Float[Array, "*batch 6"]:
    """The first two columns of rotations."""
    return _library(matrix).concatenate([matrix[..., 0], matrix[..., 1]], -1)


def turn(angle: Float[Array, "*batch"]) -> Float[Array, "*batch 3 3"]:
    """Rotations about y."""
    xp = _library(angle)
    c, s, zero, one = xp.cos(angle), xp.sin(angle), xp.zeros_like(angle), xp.ones_like(angle)
    rows = [[c, zero, s], [zero, one, zero], [-s, zero, c]]
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def heading(matrix: Float[Array, "*batch 3 3"]) -> Float[Array, "*batch"]:
    """The angle about y that a rotation turns z to."""
    return _library(matrix).arctan2(matrix[..., 0, 2], matrix[..., 2, 2])


def turned(xz: Float[Array, "*batch 2"], angle: Float[Array, "*batch"]) -> Float[Array, "*batch 2"]:
    """Points or directions of the ground, turned about y."""
    xp = _library(xz)
    c, s, x, z = xp.cos(angle), xp.sin(angle), xz[..., 0], xz[..., 1]
    return xp.stack([c * x + s * z, c * z - s * x], -1)


def facing(angle: Float[Array, "*batch"]) -> Float[Array, "*batch 2"]:
    """The direction on the ground of a heading."""
    xp = _library(angle)
    return xp.stack([xp.sin(angle), xp.cos(angle)], -1)


def from_quaternion(q: Float[Array, "*batch 4"]) -> Float[Array, "*batch 3 3"]:
    """Rotations from quaternions, the real part first."""
    xp = _library(q)
    w, x, y, z = (_unit(q)[..., i] for i in range(4))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def between(
    first: Float[Array, "*batch 3 3"],
    last: Float[Array, "*batch 3 3"],
    part: Float[Array, "*batch"],
) -> Float[Array, "*batch 3 3"]:
    """Spherical interpolation: the part of the way on the shortest arc."""
    xp = _library(first)
    relative = xp.swapaxes(first, -1, -2) @ last
    trace = relative[..., 0, 0] + relative[..., 1, 1] + relative[..., 2, 2]
    angle = xp.arccos(xp.clip((trace - 1) / 2, -1 + 1e-7, 1 - 1e-7))
    axis = xp.stack(
        [relative[..., 2, 1] - relative[..., 1, 2], relative[..., 0, 2] - relative[..., 2, 0],
         relative[..., 1, 0] - relative[..., 0, 1]], -1,
    )  # fmt: skip
    half = part * angle / 2
    axis = _unit(axis) * xp.sin(half)[..., None]
    return first @ from_quaternion(xp.concatenate([xp.cos(half)[..., None], axis], -1))


# --------------------------------------------------------------------------- kinematics


def positions(
    skeleton: Skeleton,
    rotations: Float[Array, "*batch joints 3 3"],
    root: Float[Array, "*batch 3"],
) -> Float[Array, "*batch joints 3"]:
    """Where all joints are (forward kinematics).

    Args:
      skeleton: of the body.
      rotations: of each joint against its parent, of the root against the world.
      root: where the root is.
    """
    xp = _library(root)
    turns, places = [rotations[..., 0, :, :]], [root]
    for joint in range(1, len(skeleton.parents)):
        parent = skeleton.parents[joint]
        offset = xp.asarray(skeleton.offsets[joint], root.dtype)
        places.append(places[parent] + turns[parent] @ offset)
        turns.append(turns[parent] @ rotations[..., joint, :, :])
    return xp.stack(places, -2)


class Track(NamedTuple):
    """Where a character is on the ground, frame by frame.

    Attributes:
      place: of the root.
      heading: of the root.
    """

    place: Float[Array, "*batch 2"]
    heading: Float[Array, "*batch"]


def parts(
    rows: Float[Array, "*batch numbers"],
) -> tuple[Float[Array, "*batch joints 6"], Float[Array, "*batch 4"], Float[Array, "*batch 2"]]:
    """Rotations, speeds with the height, and contacts of rows of a motion."""
    joints = (rows.shape[-1] - MOVES - CONTACTS) // 6
    six = rows[..., : 6 * joints].reshape(*rows.shape[:-1], joints, 6)
    return six, rows[..., 6 * joints : -CONTACTS], rows[..., -CONTACTS:]


def track(
    rows: Float[Array, "*batch frames numbers"],
    rate: float = 30.0,
    start: Track | None = None,
) -> Track:
    """Where a motion goes: the sum of its speeds.

    Args:
      rows: of the motion.
      rate: frames a second.
      start: where the frame before the first is; None: at the origin, at heading 0.
    """
    xp = _library(rows)
    moves = parts(rows)[1] / rate
    angle = xp.cumsum(moves[..., 2], -1)
    angle = angle if start is None else angle + start.heading[..., None]
    before = angle - moves[..., 2]
    place = xp.cumsum(turned(moves[..., :2], before), -2)
    return Track(place if start is None else place + start.place[..., None, :], angle)


def joints(
    skeleton: Skeleton, rows: Float[Array, "*batch frames numbers"], where: Track
) -> Float[Array, "*batch frames joints 3"]:
    """Positions of all joints of a motion that goes along a track."""
    xp = _library(rows)
    six, moves, _ = parts(rows)
    matrix = to_matrix(six)
    root = turn(where.heading) @ matrix[..., 0, :, :]
    matrix = xp.concatenate([root[..., None, :, :], matrix[..., 1:, :, :]], -3)
    place = xp.stack([where.place[..., 0], moves[..., 3], where.place[..., 1]], -1)
    return positions(skeleton, matrix, place)


def foot_speeds(
    skeleton: Skeleton, places: Float[Array, "*batch frames joints 3"], rate: float = 30.0
) -> Float[Array, "*batch frames 2"]:
    """Speeds of both feet on the ground since the frame before; the first frame has the second's.

    Given in metres a second.
    """
    xp = _library(places)
    feet = places[..., list(skeleton.feet), :]
    step = feet[..., 1:, :, :] - feet[..., :-1, :, :]
    speed = xp.sqrt(step[..., 0] ** 2 + step[..., 2] ** 2 + 1e-12) * rate
    return xp.concatenate([speed[..., :1, :], speed], -2)


def contacts(
    skeleton: Skeleton, places: Float[Array, "*batch frames joints 3"], rate: float = 30.0
) -> Bool[Array, "*batch frames 2"]:
    """Whether each foot touches the ground."""
    low = places[..., list(skeleton.feet), 1] < CONTACT_HEIGHT + skeleton.sole
    return low & (foot_speeds(skeleton, places, rate) < CONTACT_SPEED)


def foot_sliding(
    skeleton: Skeleton,
    places: Float[Array, "*batch frames joints 3"],
    touching: Array,
    rate: float = 30.0,
) -> Float[Array, ""]:
    """Mean speed on the ground of feet that should stand still, in metres a second.

    Args:
      skeleton: of the body.
      places: of its joints.
      touching: where a foot should stand, in this frame and in the one before.
      rate: frames a second.
    """
    xp = _library(places)
    touching = xp.asarray(touching) > 0.5
    both = touching[..., 1:, :] & touching[..., :-1, :]
    speed = foot_speeds(skeleton, places, rate)[..., 1:, :] * both
    return speed.sum() / xp.maximum(both.sum(), 1)


def rows_from_rotations(
    skeleton: Skeleton,
    rotations: Float[np.ndarray, "frames joints 3 3"],
    root: Float[np.ndarray, "frames 3"],
    rate: float = 30.0,
) -> Float[np.ndarray, "frames numbers"]:
    """A motion from rotations in the world and where the root is.

    The first frame gets the speeds of the second.
    """
    angle = np.unwrap(heading(rotations[:, 0]))
    placed = positions(skeleton, rotations, root)
    step = turned(np.diff(root[:, [0, 2]], axis=0), -angle[:-1]) * rate
    moves = np.concatenate([step, np.diff(angle)[:, None] * rate], 1)
    moves = np.concatenate([moves[:1], moves])
    local = rotations.copy()
    local[:, 0] = turn(-angle) @ rotations[:, 0]
    six = to_six(local).reshape(len(root), -1)
    touch = contacts(skeleton, placed, rate)
    return np.concatenate([six, moves, root[:, 1:2], touch], 1).astype(np.float32)


def interpolated(
    rows: Float[Array, "frames numbers"], start: int | Array, stop: int | Array
) -> Float[Array, "frames numbers"]:
    """Rows `start` to `stop - 1` filled in from the rows beside them.

    Rotations go along the shortest arc, all other numbers along a line: what a transition is
    compared with.
    """
    first, last = (jnp.take(rows, at, axis=0) for at in (start - 1, stop))
    frame = jnp.arange(rows.shape[0])
    part = jnp.clip((frame - start + 1) / (stop - start + 1), 0.0, 1.0)
    six, count = parts(rows)[0], parts(rows)[0].shape[-2]
    ends = [to_matrix(parts(end)[0]) for end in (first, last)]
    arc = jax.vmap(lambda p: between(*ends, jnp.full(count, p)))(part)
    six = to_six(arc).reshape(rows.shape[0], -1)
    rest = first + part[:, None] * (last - first)
    filled = jnp.concatenate([six, rest[:, 6 * count :]], 1)
    inside = (frame >= start) & (frame < stop)
    return jnp.where(inside[:, None], filled, rows)
