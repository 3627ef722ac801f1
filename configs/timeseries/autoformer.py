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

from zoo.recipes import traffic_forecast
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return traffic_forecast(
        "autoformer_test",
        steps=600,
        label_length=48,
        embed_dim=64,
        mlp_dim=128,
        factor=3,
        moving_average=25,
    )
