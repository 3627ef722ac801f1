"""A small TEMPO forecasts a day of network traffic from the week before.

    python train.py configs/timeseries/tempo.py

The series, the splits and the baselines are those of `configs/timeseries/itransformer.py`. A patch
is a day. GPT-2 has two blocks of 64 channels here and starts from nothing, so all of it is trained.
300 steps, a minute or two on two CPU cores; expected on scaled values, over all test windows:

    MSE    MAE
    0.81   0.62    this; 0.80 to 0.81 and 0.61 to 0.62 with three seeds
    1.11   0.68    the day before, repeated
    2.34   1.11    the last value, repeated

`forecasts.png` in the run directory shows forecasts of three validation windows against the truth.
"""

from zoo.data import Data
from zoo.data.series import Windows, network_traffic
from zoo.evaluators import ForecastPlots
from zoo.tasks import Forecasting
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

CONTEXT, HORIZON, BATCH, STEPS = 168, 24, 32, 300


def get_config() -> TrainConfig:
    """The configuration."""
    table = network_traffic()
    return TrainConfig(
        model=Model(
            "tempo_test",
            {
                "context_length": CONTEXT,
                "horizon": HORIZON,
                "variates": len(table.variates),
                "patch_length": 24,
                "stride": 24,
                "embed_dim": 64,
                "moving_average": 25,
            },
        ),
        task=Forecasting(),
        evaluators=(ForecastPlots(),),
        data=Data(
            train=Windows(table, "train", CONTEXT, HORIZON, time_features=None),
            eval=Windows(table, "val", CONTEXT, HORIZON, time_features=None),
            test=Windows(table, "test", CONTEXT, HORIZON, time_features=None),
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
