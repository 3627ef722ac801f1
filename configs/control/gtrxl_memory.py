"""A gated transformer remembers a cue for twenty steps and repeats it.

    python train.py configs/control/gtrxl_memory.py
    python train.py configs/control/gtrxl_memory.py --model.overrides.memory-length 1

The cue is seen in the first of 20 steps; in the last the agent must act as it said. `success` in
the table is how many held-out episodes end in the right action, `random_success` how many do by
chance: half, which is where the second command, whose memory holds one step, stays. 200 steps are
800 updates. Measured: 1.000 from step 40 on, with a memory of one step 0.473 at the end. About a
minute on a busy machine. `episodes.png` in the
run directory shows what is seen and done; `benchmarks/memory.py` draws the curves of several agents
in one picture.
"""

from zoo.data import Data
from zoo.environments import MemoryChain, Seeds
from zoo.evaluators import PlayedEpisodes
from zoo.tasks import Reinforcement
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, WORLDS = 200, 64


def get_config() -> TrainConfig:
    """The configuration."""
    chain = MemoryChain(20)
    fields = {"observation_dim": chain.observation_dim, "embed_dim": 32, "depth": 2, "num_heads": 2,
              "head_dim": 16, "memory_length": 32, "outputs": chain.num_actions + 1}  # fmt: skip
    return TrainConfig(
        model=Model("gtrxl_test", fields),
        task=Reinforcement(chain, unroll=20),
        data=Data(train=Seeds(100_000), eval=Seeds(512), batch_size=WORLDS, eval_batch_size=256),
        optimizer=Optimizer(learning_rate=2e-3, schedule="linear", clip=0.5, eps=1e-5),
        evaluators=(PlayedEpisodes(),),
        checkpoint=Checkpointing(metric="success"),
        num_steps=STEPS,
        eval_every=50,
        log_every=20,
    )
