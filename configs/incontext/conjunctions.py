"""Conjunctions of literals learned in context, beside the optimal learner.

    python train.py configs/incontext/conjunctions.py

Bhattamishra et al., arXiv 2310.03016, at a small size: 8 inputs, 24 points. `bayes` is the vote of
all 6,561 conjunctions that agree with the points so far. `parities.py` is the other half of the
finding. About two minutes on two CPU cores. Expected accuracy from the 13th point on: 0.925 (within
0.06 of `bayes`), where `bayes` has 0.963 and the nearest neighbour 0.811.
"""

from zoo.data.functions import prompt_data
from zoo.data.functions.baselines import never
from zoo.data.functions.boolean import Conjunction
from zoo.data.functions.known import Nearest, Terms
from zoo.evaluators import LearningCurves
from zoo.tasks import InContext
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, DIMS, POINTS = 1500, 8, 24


def get_config() -> TrainConfig:
    """The configuration."""
    model = {"dims": DIMS, "embed_dim": 64, "depth": 3, "num_heads": 4, "max_tokens": 2 * POINTS}
    references = {"bayes": Terms(), "nearest": Nearest(1), "never": never}
    return TrainConfig(
        model=Model("icl_boolean_mysan", model),
        task=InContext("logistic"),
        data=prompt_data(Conjunction(), points=POINTS, dims=DIMS, steps=STEPS),
        optimizer=Optimizer("adam", 2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(LearningCurves({}, references, "logistic", after=12),),
        checkpoint=Checkpointing(metric="loss", mode="min"),
        num_steps=STEPS,
        log_every=100,
    )
