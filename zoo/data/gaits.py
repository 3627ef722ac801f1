"""Procedural human motion with captions: walking, running, turning, waving, sitting, standing.

Motion-capture sets with captions may not be passed on; these clips are made from numbers. A body
goes along a path of given speed and turning. Each foot is planted where the path is in the middle
of its stance, stays there, and swings to the next place; legs follow by two-bone inverse
kinematics. So feet do not slide, and the gait of a given course is known exactly.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from zoo.motion.matching import Clip
from zoo.motion.skeleton import HIP, LEG, WALKER, facing, rows_from_rotations, turn

RATE = 30.0
STANDING, SITTING = 0.86, 0.55
"""Heights of the hips, in metres."""


def gait(
    speed: Float[np.ndarray, "frames"],
    turning: Float[np.ndarray, "frames"],
    wave: Float[np.ndarray, "frames"] | float = 0.0,
    sit: Float[np.ndarray, "frames"] | float = 0.0,
    phase: float = 0.0,
    rate: float = RATE,
) -> Float[np.ndarray, "frames numbers"]:
    """The rows of a motion (`zoo.motion.skeleton`) of the body `WALKER`.

    Args:
      speed: forward, metres a second.
      turning: radians a second.
      wave: how far the right hand is up and waves, 0 to 1.
      sit: how far the hips are down, 0 to 1.
      phase: of the left foot at first, 0 to 1.
      rate: frames a second.
    """
    count = len(speed)
    margin = int(2 * rate)  # footholds of the first and last frames are beyond them

    def wide(x: Any) -> np.ndarray:
        return np.pad(np.broadcast_to(np.asarray(x, float), count), margin, mode="edge")

    speed, turning, wave, sit = map(wide, (speed, turning, wave, sit))
    angle = np.concatenate([[0.0], np.cumsum(turning[1:])]) / rate
    before = np.concatenate([[0.0], angle[:-1]])
    place = np.cumsum(facing(before) * (speed / rate)[:, None], axis=0)
    beat = np.cumsum(0.8 + 0.4 * speed) / rate
    beat = beat - beat[margin] + phase
    stance = np.clip(0.66 - 0.09 * speed, 0.4, 0.62)  # part of the beat that a foot stands
    lively = np.clip((speed + 0.3 * np.abs(turning)) / 0.5, 0, 1)
    bounce = 0.02 * lively * np.cos(4 * np.pi * beat)
    height = STANDING - 0.04 * np.clip(speed - 1.4, 0, 1) + bounce
    height = height + sit * (SITTING - height)
    root = np.stack([place[:, 0], height, place[:, 1]], 1)
    matrix = np.broadcast_to(np.eye(3), (len(speed), 10, 3, 3)).copy()
    matrix[:, 0] = turn(angle)
    for first, side, shift in ((1, HIP, 0.0), (4, -HIP, 0.5)):
        foot = _foot(place, angle, beat + shift, stance, lively, side)
        _bend(matrix, first, side, foot, root, angle)
    swing = 0.5 * np.sin(2 * np.pi * beat) * np.clip(speed, 0, 1.4) / 1.4
    raised = wave * (2.4 + 0.4 * np.sin(2 * np.pi * 1.5 * np.arange(len(speed)) / rate))
    matrix[:, 8] = _pitch(-swing * (1 - wave)) @ _roll(-raised)
    matrix[:, 7] = _pitch(0.12 * np.clip(speed - 1.4, 0, 1) + 0.25 * sit)
    inside = slice(margin, margin + count)
    return rows_from_rotations(WALKER, matrix[inside], root[inside], rate)


def _foot(
    place: np.ndarray, angle: np.ndarray, beat: np.ndarray, stance: np.ndarray,
    lively: np.ndarray, side: float,
) -> Float[np.ndarray, "frames 3"]:  # fmt: skip
    """A foot that stands through the first part of each beat, and swings through the rest."""
    frames = np.arange(len(beat))
    cycle = np.floor(beat)
    part = beat - cycle
    middle = np.interp(np.arange(cycle.min(), cycle.max() + 2) + stance.mean() / 2, beat, frames)
    side_way = np.stack([np.cos(angle), -np.sin(angle)], 1) * side
    holds = np.stack([np.interp(middle, frames, (place + side_way)[:, i]) for i in (0, 1)], 1)
    number = (cycle - cycle.min()).astype(int)
    swing = np.clip((part - stance) / (1 - stance), 0, 1)
    eased = swing * swing * (3 - 2 * swing)
    ground = holds[number] + eased[:, None] * (holds[number + 1] - holds[number])
    lift = 0.12 * lively * np.sin(np.pi * swing) ** 2
    return np.stack([ground[:, 0], lift, ground[:, 1]], 1)


def _bend(
    matrix: np.ndarray, first: int, side: float, foot: np.ndarray, root: np.ndarray,
    angle: np.ndarray,
) -> None:  # fmt: skip
    """Rotations of hip and knee that put the foot where it is wanted, the knee in front."""
    local = np.einsum("tji,tj->ti", turn(angle), foot - root) - np.array([side, 0, 0])
    reach = np.linalg.norm(local, axis=1)
    down = local / reach[:, None]
    bend = np.arccos(np.clip(reach / (2 * LEG), 0, 1))[:, None]
    across = np.cross(-down, np.array([0.0, 0.0, 1.0]))
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    ahead = np.cross(across, -down)

    def along(bone: np.ndarray) -> np.ndarray:
        return np.stack([across, -bone, np.cross(across, -bone)], -1)

    thigh = along(np.cos(bend) * down + np.sin(bend) * ahead)
    shin = along(np.cos(bend) * down - np.sin(bend) * ahead)
    matrix[:, first] = thigh
    matrix[:, first + 1] = np.swapaxes(thigh, 1, 2) @ shin


def _pitch(angle: np.ndarray) -> np.ndarray:
    """Rotations about x."""
    return turn(angle)[:, [1, 2, 0]][:, :, [1, 2, 0]]


def _roll(angle: np.ndarray) -> np.ndarray:
    """Rotations about z."""
    return turn(angle)[:, [2, 0, 1]][:, :, [2, 0, 1]]


ACTIONS = ("walk", "run", "stand", "wave", "sit")


def captioned_clips(frames: int = 90, seed: int = 0) -> tuple[Clip, ...]:
    """Clips of each of `ACTIONS`, as many of one as of another: `CLIPS`.

    Walking and running come at several speeds and turnings, and with starts and stops.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(frames) / frames
    still = np.zeros(frames)
    clips = []
    for verb, speeds, top in (("walks", (0.6, 1.0, 1.4), 1.4), ("runs", (0.8, 1.6, 2.4), 2.4)):
        for speed in speeds:
            for turning in (-2.0, -1.0, -0.4, 0.0, 0.4, 1.0, 2.0):
                clips.append(_clip(f"a person {verb}", still + speed, still + turning, rng))
        ramp = np.clip(2 * time - 0.3, 0, 1)
        clips.append(_clip(f"a person {verb}", top * ramp, still, rng))
        clips.append(_clip(f"a person {verb}", top * (1 - ramp), still, rng))
        clips.append(_clip(f"a person {verb}", still + 0.3, still, rng))
    for verb in ("stands", "waves", "sits"):
        for _ in range(CLIPS):
            wave = 1.0 if verb == "waves" else 0.0
            sit = 1.0 if verb == "sits" else 0.0
            clips.append(_clip(f"a person {verb}", still, still, rng, wave, sit))
    return tuple(clips)


CLIPS = 24
"""Clips of each action."""


def _clip(
    caption: str, speed: np.ndarray, turning: np.ndarray, rng: Any, wave: float = 0.0,
    sit: float = 0.0,
) -> Clip:  # fmt: skip
    return Clip(caption, gait(speed, turning, wave, sit, phase=rng.random()))


@dataclass(frozen=True)
class GaitWindows:
    """Windows of motions whose speed, turning and posture change all the time, with a gap in each.

    Examples are `motion [length, numbers]`, `start` and `stop` of the gap, and `known [length]`.

    Attributes:
      count: examples.
      length: frames.
      gap: smallest and largest number of unknown frames.
      seed: other seeds give other motions.
      motions: of eight seconds, made when they are first needed, of which windows are cut.
    """

    count: int
    length: int = 40
    gap: tuple[int, int] = (5, 30)
    seed: int = 0
    motions: int = 400

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        motion = _motion(self.seed, int(rng.integers(self.motions)), max(240, self.length))
        return window_with_a_gap(motion, self.length, self.gap, rng)


def window_with_a_gap(
    motion: Float[np.ndarray, "frames numbers"], length: int, gap: tuple[int, int], rng: Any
) -> dict[str, Any]:
    """A random window of a motion, and a random gap in it with two known frames on both sides.

    Args:
      motion: of at least `length` frames.
      length: of the window.
      gap: smallest and largest number of unknown frames.
      rng: chooses.
    """
    first = int(rng.integers(len(motion) - length + 1))
    rows = motion[first : first + length]
    low, high = gap
    count = int(rng.integers(low, min(high, length - 4) + 1))
    start = int(rng.integers(2, length - count - 1))
    frame = np.arange(length)
    known = ((frame < start) | (frame >= start + count)).astype(np.int32)
    return {"motion": rows, "known": known, "start": np.int32(start),
            "stop": np.int32(start + count)}  # fmt: skip


@functools.lru_cache(maxsize=2048)
def _motion(seed: int, number: int, frames: int) -> Float[np.ndarray, "frames numbers"]:
    return changing_gait(np.random.default_rng((seed, number)), frames)


def changing_gait(rng: Any, length: int) -> Float[np.ndarray, "frames numbers"]:
    """A motion whose speed, turning and posture go smoothly from values to others."""

    def course(draw: Any) -> np.ndarray:
        knots = np.array([draw() for _ in range(length // 45 + 3)])
        at = np.linspace(0, len(knots) - 1.001, length)
        part = at % 1
        whole = at.astype(int)
        return knots[whole] + part * part * (3 - 2 * part) * (knots[whole + 1] - knots[whole])

    def choose(*values: float) -> Any:
        return lambda: rng.choice(values) * rng.uniform(0.8, 1.2)

    speed = course(choose(0.0, 0.7, 1.2, 1.4, 2.4))
    turning = course(lambda: rng.normal(0, 0.8))
    wave = course(lambda: float(rng.random() < 0.2))
    sit = course(lambda: 0.5 * float(rng.random() < 0.1)) * np.clip(1 - speed / 0.5, 0, 1)
    return gait(speed, turning, wave, sit, phase=rng.random())
