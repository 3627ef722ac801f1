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

from zoo.recipes import traffic_forecast
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return traffic_forecast(
        "tempo_test",
        steps=300,
        calendar=False,
        patch_length=24,
        stride=24,
        embed_dim=64,
        moving_average=25,
    )
