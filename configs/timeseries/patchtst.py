"""A small PatchTST forecasts a day of network traffic from the week before.

    python train.py configs/timeseries/patchtst.py

The series, the splits and the baselines are those of `configs/timeseries/itransformer.py`. A patch
is a day, and one begins every half day. 600 steps, a minute on two CPU cores; expected on scaled
values, over all test windows:

    MSE    MAE
    0.79   0.61    this
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
            "patchtst_test",
            {
                "context_length": CONTEXT,
                "horizon": HORIZON,
                "variates": len(table.variates),
                "patch_length": 24,
                "stride": 12,
                "embed_dim": 64,
                "mlp_dim": 128,
            },
        ),
        task=Forecasting(),
        evaluators=(ForecastPlots(),),
        data=Data(
            train=Windows(table, "train", CONTEXT, HORIZON, time_features=None),
            eval=Windows(table, "val", CONTEXT, HORIZON, time_features=None),
            test=Windows(table, "test", CONTEXT, HORIZON, time_features=None),
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
