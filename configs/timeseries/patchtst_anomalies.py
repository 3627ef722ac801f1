"""A small PatchTST learns a machine's normal temperature and finds when it was not.

    python train.py configs/timeseries/patchtst_anomalies.py

22,683 steps of 5 minutes from the Numenta Anomaly Benchmark, in the package hyperts, whose file is
read without importing it (`pip install --no-deps hyperts==0.2.2`). The first 2,000 steps, all
normal, are for training; four spans of the others, a tenth, are anomalous. Windows of 100 steps
begin at every step, and one per cent of all energies is above the threshold, as in
Time-Series-Library. 300 steps, a minute on two CPU cores; expected at the end:

    precision  recall  F1
    0.41       0.04    0.07    raw: each step by itself
    0.94       0.89    0.92    adjusted: a span counts as found where one step of it is

The second is what papers report, and flatters (`zoo.evaluators.anomalies`). `anomalies.png` in
the run directory shows the energy of every step, the threshold and the spans.
"""

from zoo.data import Data
from zoo.data.series import Segments, machine_temperature
from zoo.evaluators import AnomalyScores
from zoo.tasks import AnomalyDetection
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

LENGTH, STEPS = 100, 300


def get_config() -> TrainConfig:
    """The configuration."""
    table = machine_temperature()
    return TrainConfig(
        model=Model(
            "patchtst_test",
            {
                "context_length": LENGTH,
                "horizon": LENGTH,
                "variates": len(table.variates),
                "patch_length": 16,
                "stride": 8,
            },
        ),
        task=AnomalyDetection(),
        evaluators=(AnomalyScores(anomaly_ratio=1.0),),
        data=Data(
            train=Segments(table, "train", LENGTH),
            eval=Segments(table, "test", LENGTH),
            batch_size=64,
            eval_batch_size=512,
        ),
        optimizer=Optimizer(
            name="adam", learning_rate=2e-3, schedule="one_cycle", initial_fraction=0.04
        ),
        checkpoint=Checkpointing(every=STEPS, keep_best=0),  # there is no validation split
        num_steps=STEPS,
        log_every=50,
    )
