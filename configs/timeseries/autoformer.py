"""A small Autoformer forecasts a day of network traffic from the week before.

    python train.py configs/timeseries/autoformer.py

The series, the splits and the baselines are those of `configs/timeseries/itransformer.py`. The
decoder sees the last two days; the trend is the mean over 25 hours. 600 steps, two minutes on two
CPU cores; expected on scaled values, over all test windows:

    MSE    MAE
    0.90   0.65    this; it fits the training rows too well: 0.42 there
    1.11   0.68    the day before, repeated
    2.34   1.11    the last value, repeated

`forecasts.png` in the run directory shows forecasts of three validation windows against the truth.
"""

from zoo.data import Data
from zoo.data.series import Windows, network_traffic
from zoo.evaluators import ForecastPlots
from zoo.tasks import Forecasting
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

CONTEXT, HORIZON, STEPS = 168, 24, 600


def get_config() -> TrainConfig:
    """The configuration."""
    table = network_traffic()
    return TrainConfig(
        model=Model(
            "autoformer_test",
            {
                "context_length": CONTEXT,
                "label_length": 48,
                "horizon": HORIZON,
                "variates": len(table.variates),
                "embed_dim": 64,
                "mlp_dim": 128,
                "factor": 3,
                "moving_average": 25,
            },
        ),
        task=Forecasting(),
        evaluators=(ForecastPlots(),),
        data=Data(
            train=Windows(table, "train", CONTEXT, HORIZON),
            eval=Windows(table, "val", CONTEXT, HORIZON),
            test=Windows(table, "test", CONTEXT, HORIZON),
            batch_size=32,
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
