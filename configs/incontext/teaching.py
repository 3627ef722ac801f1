"""Teaching sequences shorten learning.

    python train.py configs/incontext/teaching.py

Bhattamishra et al., arXiv 2310.03016, at a small size: monotone conjunctions of 8 inputs, 24
points. Half of the prompts begin with the points that single out the conjunction, and the learner
sees both kinds. `bayes` is the vote of all 256 that agree. About two minutes on two CPU cores.
Expected accuracy from the ninth point on: 1.000 behind a teaching sequence (above 0.98), 0.882
without (below 0.95), where `bayes` has 1.000 and 0.959.
"""

from zoo.data.functions import Either, Prompts, prompt_data
from zoo.data.functions.boolean import TEACH_CONJUNCTION, Conjunction
from zoo.data.functions.known import Nearest, Terms
from zoo.evaluators import LearningCurves
from zoo.tasks import InContext
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, DIMS, POINTS = 1500, 8, 24
PLAIN = Conjunction(0.3, 0.0, forced=0.4)


def get_config() -> TrainConfig:
    """The configuration."""
    model = {"dims": DIMS, "embed_dim": 64, "depth": 3, "num_heads": 4, "max_tokens": 2 * POINTS}
    sets = {
        "taught": Prompts(TEACH_CONJUNCTION, 512, POINTS, DIMS, seed=1),
        "plain": Prompts(PLAIN, 512, POINTS, DIMS, seed=1),
    }
    references = {"bayes": Terms(0.3, 0.0), "nearest": Nearest(1)}
    both = Either((TEACH_CONJUNCTION, PLAIN))
    return TrainConfig(
        model=Model("icl_boolean_mysan", model),
        task=InContext("logistic"),
        data=prompt_data(both, points=POINTS, dims=DIMS, steps=STEPS),
        optimizer=Optimizer("adam", 2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(LearningCurves(sets, references, "logistic", after=8),),
        checkpoint=Checkpointing(metric="loss", mode="min"),
        num_steps=STEPS,
        log_every=100,
    )
