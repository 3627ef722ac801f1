"""A student of four steps learns from the flow that takes fifty (distribution matching).

    python train.py configs/imaging/flow_ring.py --workdir runs/flow_ring
    python train.py configs/imaging/few_steps_ring.py

Student, teacher and the network that watches the student all begin as the trained flow; the teacher
stays as it is. 1,000 steps, a minute and a half on two busy CPU cores; measured `distance` from
held-out points (sliced Wasserstein): 0.0099 in four steps; the teacher reaches 0.0115 in fifty and
0.037 in four, and fresh points of the ring itself are 0.007 away. See `samples.png` in the run
directory.

Networks are compared where there is little noise (`level_mean`): above, what the corners' spread
changes in a clean sample (0.0025 of 0.05) is less than what the teacher errs (0.01), and the spread
of the student was 0.064.
"""

from dataclasses import replace
from pathlib import Path

from zoo.tasks import StepDistillation
from zoo.training import Optimizer, TrainConfig
from zoo.training.config import load_file

STEPS = 1000


def get_config() -> TrainConfig:
    """The configuration."""
    flow = load_file(Path(__file__).with_name("flow_ring.py"))
    model = replace(flow.model, checkpoint="runs/flow_ring")
    adam = Optimizer(name="adam", learning_rate=5e-4, b1=0.0)
    return replace(
        flow,
        model={"student": model, "teacher": model, "fake": model},
        task=StepDistillation(replace(flow.task, level_mean=-1.5), steps=4),
        optimizer={"student": adam, "fake": adam},
        num_steps=STEPS,
        eval_every=STEPS,
        log_every=50,
        ema_decay=0.995,
    )
