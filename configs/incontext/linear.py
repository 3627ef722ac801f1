"""Linear functions learned in context, beside least squares, neighbours and averaging.

    python train.py configs/incontext/linear.py

Garg et al., arXiv 2208.01066, at a small size: x in R^3, 12 points. About two minutes on two CPU
cores. Expected squared error over d, from the seventh point on: 0.09 (below 0.15), where averaging
has 0.56, three neighbours 0.55 and least squares 0.
"""

from zoo.data.functions import Ramp, prompt_data
from zoo.data.functions.continuous import Linear
from zoo.evaluators import LearningCurves
from zoo.evaluators.learning_curves import REFERENCES
from zoo.tasks import InContext
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, DIMS, POINTS = 2000, 3, 12


def get_config() -> TrainConfig:
    """The configuration."""
    model = {"dims": DIMS, "max_points": POINTS, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return TrainConfig(
        model=Model("icl_sequential_tiny", model),
        task=InContext(),
        data=prompt_data(
            Linear(),
            points=POINTS,
            dims=DIMS,
            steps=STEPS,
            dims_ramp=Ramp(1, DIMS, interval=250),
        ),
        optimizer=Optimizer("adam", 2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(LearningCurves(references=REFERENCES, scale=DIMS, after=6),),
        checkpoint=Checkpointing(metric="loss", mode="min"),
        num_steps=STEPS,
        log_every=100,
    )
