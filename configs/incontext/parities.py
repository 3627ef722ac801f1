"""Parities are not learned in context, where conjunctions are.

    python train.py configs/incontext/parities.py

Bhattamishra et al., arXiv 2310.03016, at a small size: any subset of 8 inputs, 24 points, and the
learner, steps and rate of `conjunctions.py`. `bayes` solves the linear equations that the points
are over the field of two. About two minutes on two CPU cores. Expected accuracy from the 13th point
on: 0.52 (below 0.6), where `bayes` has 0.997.
"""

from zoo.data.functions import prompt_data
from zoo.data.functions.boolean import Parity
from zoo.data.functions.known import Nearest, Parities
from zoo.evaluators import LearningCurves
from zoo.tasks import InContext
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, DIMS, POINTS = 1500, 8, 24


def get_config() -> TrainConfig:
    """The configuration."""
    model = {"dims": DIMS, "embed_dim": 64, "depth": 3, "num_heads": 4, "max_tokens": 2 * POINTS}
    references = {"bayes": Parities(), "nearest": Nearest(1)}
    return TrainConfig(
        model=Model("icl_boolean_mysan", model),
        task=InContext("logistic"),
        data=prompt_data(Parity(), points=POINTS, dims=DIMS, steps=STEPS),
        optimizer=Optimizer("adam", 2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(LearningCurves({}, references, "logistic", after=12),),
        checkpoint=Checkpointing(metric="loss", mode="min"),
        num_steps=STEPS,
        log_every=100,
    )
