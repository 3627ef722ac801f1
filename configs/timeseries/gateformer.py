"""A small Gateformer forecasts a day of network traffic from the week before.

    python train.py configs/timeseries/gateformer.py

The series, the splits and the baselines are those of `configs/timeseries/itransformer.py`. 300
steps, half a minute on two busy CPU cores (it learns no more after them); expected on scaled
values, over all test windows:

    MSE    MAE
    0.79   0.60    this; 0.79 to 0.80 and 0.60 to 0.61 with three seeds
    1.11   0.68    the day before, repeated
    2.34   1.11    the last value, repeated

`forecasts.png` in the run directory shows forecasts of three validation windows against the truth.
"""

from zoo.recipes import traffic_forecast
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return traffic_forecast(
        "gateformer_test",
        steps=300,
        evaluations=3,
        embed_dim=64,
        mlp_dim=64,
    )
