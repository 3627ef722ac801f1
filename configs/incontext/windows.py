"""Functions of the last two points, and what random labels in the prompt do to what was learned.

    python train.py configs/incontext/windows.py

For Campbell et al., arXiv 2312.12655, with windows and random labels as `zoo.data.functions`
defines them: x in R, 16 points. Training has no random label; the sets replace a part of the
labels that are shown, and the error is that of the true ones.

Measured squared error from the ninth point on: 0.56 with true labels, and 0.92, 1.37, 1.71 and 1.83
with 25, 50, 75 and 100 % random ones. Least squares on single points has 0.57, on windows 0: so the
window itself is not learned, and 5,000 steps at half the rate change little (0.55). Five minutes on
a busy machine.
"""

from zoo.data.functions import Prompts, prompt_data
from zoo.data.functions.baselines import least_squares
from zoo.data.functions.continuous import RandomLabels, Window
from zoo.data.functions.known import WindowLeastSquares
from zoo.evaluators import LearningCurves
from zoo.tasks import InContext
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, DIMS, POINTS, WIDTH = 1500, 1, 16, 2
RATES = (0.25, 0.5, 0.75, 1.0)


def get_config() -> TrainConfig:
    """The configuration."""
    model = {"dims": DIMS, "max_points": POINTS, "embed_dim": 64, "depth": 3, "num_heads": 4}
    sets = {
        f"random_{rate:g}": Prompts(RandomLabels(Window(WIDTH), rate), 512, POINTS, DIMS, seed=1)
        for rate in RATES
    }
    references = {"window": WindowLeastSquares(WIDTH), "point": least_squares}
    return TrainConfig(
        model=Model("icl_sequential_tiny", model),
        task=InContext(),
        data=prompt_data(Window(WIDTH), points=POINTS, dims=DIMS, steps=STEPS),
        optimizer=Optimizer("adam", 2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(LearningCurves(sets, references, scale=DIMS, after=8),),
        checkpoint=Checkpointing(metric="loss", mode="min"),
        num_steps=STEPS,
        log_every=100,
    )
