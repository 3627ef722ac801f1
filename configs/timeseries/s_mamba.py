"""A small S-Mamba forecasts a day of network traffic from the week before.

    python train.py configs/timeseries/s_mamba.py

The series, the splits and the baselines are those of `configs/timeseries/itransformer.py`. 300
steps, half a minute on two busy CPU cores (it learns no more after them); expected on scaled
values, over all test windows:

    MSE    MAE
    0.81   0.61    this; 0.80 to 0.82 and 0.61 to 0.62 with three seeds
    1.11   0.68    the day before, repeated
    2.34   1.11    the last value, repeated

`forecasts.png` in the run directory shows forecasts of three validation windows against the truth.
"""

from zoo.recipes import traffic_forecast
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return traffic_forecast(
        "s_mamba_test",
        steps=300,
        evaluations=3,
        embed_dim=128,
        mlp_dim=128,
    )
