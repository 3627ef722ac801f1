"""A small transformer fills in transitions between gaits; a story is played with it.

    python train.py configs/motion/story_to_motion.py

The motions are procedural: no set of motion capture with captions may be passed on. In the table
`joint_error` (metres) and `foot_sliding` (metres a second) of held-out gaps of 10 frames stand
beside `line_joint_error` and `line_foot_sliding`, those of interpolating rotations along arcs and
places along lines. `story.gif` in the run directory is a story from text to motion.

What a transformer of transitions should reach is 70 % of the interpolation's error and half of
its sliding. The only run that was measured, of 1,500 steps on gaits that changed more abruptly, did
not: 0.10 m against 0.09 m, 1.26 m/s against 0.72 m/s. The steps below are more; their figure is not
known.
"""

from zoo.data import Data
from zoo.data.gaits import GaitWindows
from zoo.evaluators import PlayedStory
from zoo.tasks import MotionCompletion
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS = 8000


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model("story_to_motion_tiny"),
        task=MotionCompletion(),
        data=Data(
            train=GaitWindows(100_000, length=30, gap=(5, 14)),
            eval=GaitWindows(256, length=30, gap=(10, 10), seed=1),
            batch_size=32,
            eval_batch_size=128,
        ),
        optimizer=Optimizer(learning_rate=2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(PlayedStory(),),
        checkpoint=Checkpointing(metric="joint_error", mode="min"),
        num_steps=STEPS,
        log_every=400,
    )
