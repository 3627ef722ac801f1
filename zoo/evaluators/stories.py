"""A story that is played: how far it ends from its places, how feet slide, and an animation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from zoo.evaluators.evaluator import Evaluator
from zoo.motion.skeleton import Skeleton

STORY = (
    "Anna walks to the door and waves for 3 seconds. Then she runs to the bench and sits for 3 "
    "seconds. Then she walks to the tree, and waits."
)
PLACES = {"door": (3.0, 0.0, 2.0), "bench": (-2.0, 0.0, 4.0), "tree": (-3.0, 0.0, -1.0)}


@dataclass(frozen=True)
class PlayedStory(Evaluator):
    """`story.gif`: a story on procedural clips, whose transitions the network fills in.

    Attributes:
      every: steps between stories; 0 is at the end only.
      steps: of the player.
    """

    every: int = 0
    steps: int = 120

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """The largest distance from a place at its end, and sliding of feet with and without."""
        import jax

        from zoo.data.gaits import captioned_clips
        from zoo.motion import matching, skeleton
        from zoo.motion.scheduler import Scene, schedule
        from zoo.motion.stream import Player, filled_by, make_plan

        body, scene = program.task.body, Scene(PLACES)
        plan = make_plan(schedule(STORY, scene), scene, matching.hashed_words)
        found: dict[str, float] = {}
        for name, options in (
            ("line_", {}),
            ("", {"fill": filled_by(program.networks, dict(variables))}),
        ):
            player = Player(**options)
            clips = captioned_clips()
            base = matching.make_database(clips, body, matching.hashed_words, player.duration)
            _, frames = player.play(base, plan, player.init_state(base), self.steps)
            frames = jax.device_get(frames)
            ends = []
            for number in range(len(plan.frames)):
                mine = np.flatnonzero(frames.segment == number)
                if plan.moves[number] and len(mine):
                    end = frames.where.place[mine[-1]]
                    ends.append(np.linalg.norm(end - np.asarray(plan.path[number, -1])))
            joints = skeleton.joints(body, frames.rows, frames.where)
            touching = skeleton.parts(frames.rows)[2]
            sliding = skeleton.foot_sliding(body, joints, touching)
            found |= {f"{name}place_error": float(max(ends)),
                      f"{name}story_sliding": float(sliding)}  # fmt: skip
        save_animation(folder / "story.gif", body, joints, PLACES)
        return found


def save_animation(
    path: Path,
    body: Skeleton,
    joints: Float[np.ndarray, "frames joints 3"],
    places: Mapping[str, tuple[float, float, float]],
    every: int = 3,
    size: int = 320,
) -> None:
    """A body that goes over the ground, seen from the side and above, as an endless animation.

    Args:
      path: of the file.
      body: whose bones are drawn.
      joints: positions at 30 frames a second.
      places: what is named on the ground.
      every: frames between two of the animation.
      size: of the picture, in pixels.
    """
    from PIL import Image, ImageDraw

    points = np.asarray(joints)[::every]
    ground = np.concatenate([points[:, 0], np.array([*places.values()] or [(0, 0, 0)])])[:, [0, 2]]
    low, high = ground.min(0) - 1.5, ground.max(0) + 1.5
    scale = size / max(high - low)

    def seen(x: np.ndarray) -> tuple[float, float]:
        flat = (x[..., [0, 2]] - low) * scale
        return float(flat[0]), float(size - 0.8 * flat[1] - 0.6 * scale * x[1])

    pictures = []
    for i, pose in enumerate(points):
        picture = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(picture)
        for name, place in places.items():
            x, y = seen(np.asarray(place))
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline="tomato")
            draw.text((x + 6, y - 5), name, fill="tomato")
        trail = [seen(p * np.array([1, 0, 1])) for p in points[max(0, i - 40) : i + 1, 0]]
        if len(trail) > 1:
            draw.line(trail, fill="lightblue", width=2)
        for joint, parent in enumerate(body.parents):
            if parent >= 0:
                draw.line((seen(pose[parent]), seen(pose[joint])), fill="black", width=2)
        pictures.append(picture)
    first, *rest = pictures
    first.save(path, save_all=True, append_images=rest, duration=round(1000 * every / 30), loop=0)
