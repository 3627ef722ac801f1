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

from zoo.recipes import traffic_forecast
from zoo.training import TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    return traffic_forecast(
        "patchtst_test",
        steps=600,
        calendar=False,
        patch_length=24,
        stride=12,
        embed_dim=64,
        mlp_dim=128,
    )
