"""A mean and a deviation for each label: near Bayes where it was trained, and not where it was not.

    python train.py configs/incontext/uncertainty.py

For Liu et al., arXiv 2405.15115, at a small size: x in R, 20 points, noise of 0.5 or 2. The sets
have noise, weights and inputs that training never had. `trained` is Bayes' rule with the prior of
training, which the paper compares with; `informed` knows the prior of the set.

Measured negative log-likelihood (less half of log 2 pi) from the sixth point on: 0.64 where it was
trained, Bayes 0.57. Noise of 6: 4.63, where Bayes with the old prior has 5.33 and who knows the new
one 2.32. Weights three times as large: 1.25, Bayes 0.65 and 0.58. Inputs three times as wide: 1.31,
Bayes 0.58. Seven minutes on a busy machine.
"""

from zoo.data.functions import Prompts, prompt_data
from zoo.data.functions.known import Bayes
from zoo.data.functions.uncertain import NoisyLinear
from zoo.evaluators import LearningCurves
from zoo.tasks import InContext
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, DIMS, POINTS = 2500, 1, 20
SIGMAS = (0.5, 2.0)
SHIFTS = {
    "noise_6": NoisyLinear((6.0,)),
    "weights_3": NoisyLinear(SIGMAS, tau=3.0),
    "inputs_3": NoisyLinear(SIGMAS, deviations=(3.0,)),
}


def get_config() -> TrainConfig:
    """The configuration."""
    sets = {name: Prompts(f, 512, POINTS, DIMS, seed=1) for name, f in SHIFTS.items()}
    references = {"trained": Bayes(SIGMAS)} | {
        f"{name}/informed": Bayes(f.sigmas, f.tau) for name, f in SHIFTS.items()
    }
    model = {"dims": DIMS}
    return TrainConfig(
        model=Model("icl_uncertainty_d2", model),
        task=InContext("gaussian"),
        data=prompt_data(NoisyLinear(SIGMAS), points=POINTS, dims=DIMS, steps=STEPS),
        optimizer=Optimizer("adam", 2e-3, schedule="cosine", warmup_steps=100, clip=1.0),
        evaluators=(LearningCurves(sets, references, "gaussian", against="ys", after=5),),
        checkpoint=Checkpointing(metric="loss", mode="min"),
        num_steps=STEPS,
        log_every=100,
    )
