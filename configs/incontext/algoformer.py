"""AlgoFormer and the looped transformer beside a standard one of as many parameters.

    python train.py configs/incontext/algoformer.py

For Gao et al., arXiv 2402.13572, at a small size: `y = a . phi(x)` with one fixed layer phi for all
prompts and an a for each, x in R^3, 12 points. Each of the three has three blocks, within 10 % in
parameters; the loops run 3 (looped) and 4 times. All see the same prompts.

Measured squared error over d from the ninth point on: looped 0.204, standard 0.224, AlgoFormer
0.255, least squares on x itself 0.150. So in 1,000 steps the looped one is ahead of the standard
one, and AlgoFormer, which the paper finds ahead of both, is not. Six minutes on a busy machine.
"""

from zoo.data.functions import prompt_data
from zoo.data.functions.baselines import least_squares
from zoo.data.functions.continuous import ReluNetwork
from zoo.evaluators import LearningCurves
from zoo.tasks import InContext
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, DIMS, POINTS = 1000, 3, 12
REPRESENTED = ReluNetwork(units=6, fixed=0, slope=0.5)


def get_config() -> TrainConfig:
    """The configuration."""
    size = {"dims": DIMS, "max_points": POINTS, "embed_dim": 32, "num_heads": 4}
    models = {
        "standard": Model("looped_standard", {**size, "depth": 3}),
        "looped": Model("looped_linear", {**size, "depth": 3, "loops": 3, "window": 2}),
        "algoformer": Model("algoformer_111", {**size, "loops": 4, "window": 2}),
    }
    references = {"least_squares": least_squares}
    return TrainConfig(
        model=models,
        task=InContext(networks=tuple(models)),
        data=prompt_data(REPRESENTED, points=POINTS, dims=DIMS, steps=STEPS),
        optimizer=Optimizer("adam", 2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(LearningCurves({}, references, scale=DIMS, after=8),),
        checkpoint=Checkpointing(metric="standard_loss", mode="min"),
        num_steps=STEPS,
        log_every=100,
    )
