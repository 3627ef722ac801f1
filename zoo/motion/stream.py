"""Endless playing: match a clip, fill in the way to it, play it, and match again.

What is carried from step to step has one size, however long the story is: where the character is,
which frame of the data base it played last, its last poses, and how far the plan is. So thousands
of frames come in chunks, at the memory of one chunk, and are those of one run over all of them:

    player = Player(duration=10, gap=5)
    state = player.init_state(database)
    for frames in player.stream(database, plan, state, steps=1000, chunk=20):
        ...

A step plays `duration` frames. The first `gap` of them are filled in between the poses that were
played and the rest of the clip, by `fill`: `zoo.motion.skeleton.interpolated`, or a
`ProgressiveTransformer` (see `filled_by`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.motion import matching, skeleton
from zoo.motion.matching import AHEAD, PATH, POSE, Database
from zoo.motion.scheduler import Scene, Segment, find_path
from zoo.motion.skeleton import Track

Fill = Callable[[Float[Array, "frames numbers"], int, int], Float[Array, "frames numbers"]]
"""`(window, start, stop) -> window` with the frames `[start, stop)` filled in."""


CLOSE = 1.2
"""Metres from the end of a path at which a character goes straight to it."""


class Plan(NamedTuple):
    """Segments as arrays.

    Attributes:
      text: of each segment, as numbers.
      path: of each segment, in points at equal distances; one place repeated if it has none.
      spacing: the distance between two of them.
      speed: along the path, metres a second.
      frames: how long the segment lasts (in place), or may last (on the way) at most.
      moves: whether it ends where the path does, rather than after its frames.
    """

    text: Float[Array, "segments channels"]
    path: Float[Array, "segments points 2"]
    spacing: Float[Array, "segments"]
    speed: Float[Array, "segments"]
    frames: Int[Array, "segments"]
    moves: Array


class State(NamedTuple):
    """What is carried; see the module.

    Attributes:
      where: the character is on the ground.
      frame: of the data base that was played last.
      context: the last rows that were played.
      segment: of the plan; their number when all are done.
      played: frames of the segment.
      along: metres of its path.
    """

    where: Track
    frame: Int[Array, ""]
    context: Float[Array, "context numbers"]
    segment: Int[Array, ""]
    played: Int[Array, ""]
    along: Float[Array, ""]


class Frames(NamedTuple):
    """What is played.

    Attributes:
      rows: of the motion.
      where: the root is.
      clip: number of the clip of each frame.
      segment: number of the segment of each frame.
    """

    rows: Float[Array, "frames numbers"]
    where: Track
    clip: Int[Array, "frames"]
    segment: Int[Array, "frames"]


def make_plan(
    segments: Sequence[Segment],
    scene: Scene,
    embed: Callable[[Sequence[str]], np.ndarray],
    start: tuple[float, float] = (0.0, 0.0),
    points: int = 64,
    rate: float = 30.0,
) -> Plan:
    """The plan of a schedule.

    Args:
      segments: of the scheduler.
      scene: whose blocked cells the paths go around.
      embed: texts to numbers, the one of the data base.
      start: where the character is at first.
      points: of a path.
      rate: frames a second.
    """
    paths, speeds, frames, moves, here = [], [], [], [], start
    for segment in segments:
        goal = here if segment.place is None else (segment.place[0], segment.place[2])
        path = find_path(scene, here, goal, points)
        length = float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
        moving = length > 0.3
        paths.append(path)
        speeds.append(min(max(length / segment.seconds, 0.5), 3.0) if moving else 0.0)
        frames.append(round(segment.seconds * rate * (4 if moving else 1)))
        moves.append(moving)
        here = goal
    path = np.stack(paths)
    spacing = np.linalg.norm(path[:, 1] - path[:, 0], axis=-1)
    text = embed([segment.text for segment in segments])
    floats = [jnp.asarray(x, jnp.float32) for x in (text, path, spacing, speeds)]
    return Plan(*floats, jnp.asarray(frames, jnp.int32), jnp.asarray(moves))


@dataclass(frozen=True)
class Player:
    """Plays a plan from a data base.

    Attributes:
      duration: frames of a step.
      gap: how many of them are filled in.
      context: poses that `fill` sees before the gap.
      keep: clips whose captions may fit.
      guard: frames around the one that was played last that are not played again.
      radius: metres from the end of a path at which it is done.
      path_weight: of the features of the path, against 1 of those of the pose.
      rate: frames a second.
      fill: fills the gap in.
    """

    duration: int = 10
    gap: int = 5
    context: int = 8
    keep: int = 24
    guard: int = 8
    radius: float = 0.2
    path_weight: float = 8.0
    rate: float = 30.0
    fill: Fill = skeleton.interpolated

    def __post_init__(self):
        if not 0 <= self.gap < self.duration:
            raise ValueError(
                f"gap={self.gap} must be below duration={self.duration}: at least one frame of "
                "the clip is played as it is."
            )

    def init_state(
        self, database: Database, place: tuple[float, float] = (0.0, 0.0), heading: float = 0.0
    ) -> State:
        """A character that stands still, in the pose of the slowest frame of the data base."""
        where = Track(jnp.asarray(place, jnp.float32), jnp.asarray(heading, jnp.float32))
        speed = jnp.abs(skeleton.parts(database.rows)[1][:, :3]).sum(-1)
        frame = jnp.argmin(speed).astype(jnp.int32)
        context = jnp.repeat(database.rows[frame][None], self.context, axis=0)
        zero = jnp.zeros((), jnp.int32)
        return State(where, frame, context, zero, zero, jnp.zeros(()))

    def step(self, database: Database, plan: Plan, state: State) -> tuple[State, Frames]:
        """Search, fill in, and play `duration` frames."""
        count = len(plan.frames)
        at = jnp.minimum(state.segment, count - 1)
        text, path, spacing, speed, limit, moves = (part[at] for part in plan)
        along, places, directions = self._wanted(state, path, spacing, speed, moves)
        query = matching.query_features(database, state.frame, places, directions)
        weights = jnp.concatenate([jnp.full(PATH, self.path_weight), jnp.ones(POSE)])
        allowed = matching.candidates(
            matching.distances(text, database.text), database.clip, database.left, state.frame,
            keep=self.keep, duration=self.duration, guard=self.guard,
        )  # fmt: skip
        frame = matching.match(database.features, query, weights, allowed).frame
        clip = jax.lax.dynamic_slice_in_dim(database.rows, frame, self.duration)
        window = jnp.concatenate([state.context, clip])
        if self.gap:
            window = self.fill(window, self.context, self.context + self.gap)
        rows = window[self.context :]
        where = skeleton.track(rows, self.rate, state.where)
        last = jax.tree.map(lambda x: x[-1], where)
        played = state.played + self.duration
        reached = jnp.linalg.norm(last.place - path[-1]) < self.radius
        done = (moves & reached) | (played >= limit)
        numbers = jnp.full(self.duration, database.clip[frame]), jnp.full(self.duration, at)
        new = State(
            last,
            (frame + self.duration - 1).astype(jnp.int32),
            window[-self.context :],
            jnp.minimum(state.segment + done, count).astype(jnp.int32),
            jnp.where(done, 0, played).astype(jnp.int32),
            jnp.where(done, 0.0, along),
        )
        return new, Frames(rows, where, *numbers)

    def _wanted(
        self, state: State, path: Array, spacing: Array, speed: Array, moves: Array
    ) -> tuple[Array, Array, Array]:
        """How far along the path the character is, and where it should be and face then."""
        arc = jnp.arange(len(path)) * spacing
        near = (arc >= state.along) & (arc <= state.along + 1.0 + spacing)
        far = jnp.linalg.norm(path - state.where.place, axis=-1)
        along = arc[jnp.argmin(jnp.where(near, far, jnp.inf))]
        ahead = along + speed * jnp.asarray(AHEAD) / self.rate
        point = jnp.minimum(ahead / jnp.maximum(spacing, 1e-6), len(path) - 1.0)
        low = jnp.minimum(point.astype(jnp.int32), len(path) - 2)
        places = path[low] + (point - low)[:, None] * (path[low + 1] - path[low])
        tangent = (path[low + 1] - path[low]) / jnp.maximum(spacing, 1e-6)
        # Near its end the path is left: the character goes straight to the end, and slows down.
        to_end = path[-1] - state.where.place
        off = jnp.linalg.norm(to_end)
        straight = to_end / jnp.maximum(off, 1e-6)
        slow = jnp.minimum(speed, jnp.maximum(off, 0.6))
        steps = jnp.minimum(slow * jnp.asarray(AHEAD) / self.rate, off)
        closing = arc[-1] - along < CLOSE
        places = jnp.where(closing, state.where.place + steps[:, None] * straight, places)
        tangent = jnp.where(closing, straight, tangent)
        turn = partial(skeleton.turned, angle=-state.where.heading)
        places, tangent = turn(places - state.where.place), turn(tangent)
        places = jnp.where(moves, places, 0.0)
        return along, places, jnp.where(moves, tangent, jnp.array([0.0, 1.0]))

    def play(
        self, database: Database, plan: Plan, state: State, steps: int
    ) -> tuple[State, Frames]:
        """So many steps in one program."""
        state, frames = _play(self, database, plan, state, steps)
        return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), frames)

    def stream(
        self, database: Database, plan: Plan, state: State, steps: int, chunk: int = 20
    ) -> Iterator[tuple[State, Frames]]:
        """The same in chunks of steps, each with the state behind it, until the plan is done.

        Raises:
          ValueError: if `chunk` does not divide `steps`.
        """
        if steps % chunk:
            raise ValueError(f"chunk={chunk} does not divide steps={steps}; choose a divisor.")
        for _ in range(steps // chunk):
            state, frames = self.play(database, plan, state, chunk)
            yield state, jax.device_get(frames)


@partial(jax.jit, static_argnames=("player", "steps"))
def _play(player: Player, database: Database, plan: Plan, state: State, steps: int) -> Any:
    return jax.lax.scan(lambda state, _: player.step(database, plan, state), state, length=steps)


@dataclass(frozen=True)
class filled_by:
    """`fill` of a `ProgressiveTransformer` and its variables.

    Attributes:
      model: whose `complete` fills.
      variables: of it.
    """

    model: nn.Module
    variables: Any

    def __call__(
        self, window: Float[Array, "frames numbers"], start: int, stop: int
    ) -> Float[Array, "frames numbers"]:
        """The window with the gap filled in."""
        ends = (jnp.full(1, edge, jnp.int32) for edge in (start, stop))
        return self.model.apply(self.variables, window[None], *ends, method="complete")[0]

    def __hash__(self) -> int:
        return hash((self.model, id(self.variables)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, filled_by)
            and self.model == other.model
            and self.variables is other.variables
        )
