"""Configurations that several experiments share."""

from typing import Any

from zoo.data import Data
from zoo.data.digits import enlarged_digits
from zoo.data.series import Windows, network_traffic
from zoo.evaluators import ForecastPlots
from zoo.tasks import Classification, Forecasting
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig


def digits(
    model: str,
    epochs: int,
    size: tuple[int, int] = (32, 32),
    learning_rate: float = 2e-3,
    clip: float | None = None,
    **fields: Any,
) -> TrainConfig:
    """A classifier of scikit-learn's 1,437 handwritten digits, 64 at a time, by AdamW in one cycle.

    Args:
      model: name of a variant.
      epochs: how often each image is seen.
      size: height and width to which the images of 8x8 pixels are enlarged.
      learning_rate: the peak, after 30 % of the steps.
      clip: largest norm of a gradient; None: no limit.
      **fields: of the model, beside its single input channel.
    """
    steps = epochs * 1437 // 64
    return TrainConfig(
        model=Model(model, {"in_channels": 1, **fields}),
        task=Classification(),
        data=enlarged_digits(size, 64),
        optimizer=Optimizer(
            learning_rate=learning_rate,
            schedule="one_cycle",
            initial_fraction=0.04,
            weight_decay=0.05,
            clip=clip,
        ),
        checkpoint=Checkpointing(every=steps),
        num_steps=steps,
        eval_every=steps // 4,
        log_every=50,
    )


def traffic_forecast(
    model: str,
    steps: int,
    evaluations: int = 6,
    learning_rate: float = 1e-3,
    calendar: bool = True,
    **fields: Any,
) -> TrainConfig:
    """A forecaster of the next day of network traffic from the week before, by Adam in one cycle.

    The series are the six of `zoo.data.series.network_traffic`, an hour a row.

    Args:
      model: name of a variant.
      steps: of 32 windows each.
      evaluations: how often the validation rows are forecast.
      learning_rate: the peak, after 30 % of the steps.
      calendar: whether the model is told hours and days, too.
      **fields: of the model, beside its lengths and its number of series.
    """
    table, context, horizon = network_traffic(), 168, 24

    def windows(split: str) -> Windows:
        return Windows(
            table, split, context, horizon, time_features="features" if calendar else None
        )

    lengths = {"context_length": context, "horizon": horizon, "variates": len(table.variates)}
    return TrainConfig(
        model=Model(model, {**lengths, **fields}),
        task=Forecasting(),
        evaluators=(ForecastPlots(),),
        data=Data(
            train=windows("train"),
            eval=windows("val"),
            test=windows("test"),
            batch_size=32,
            eval_batch_size=64,
        ),
        optimizer=Optimizer(
            name="adam", learning_rate=learning_rate, schedule="one_cycle", initial_fraction=0.04
        ),
        checkpoint=Checkpointing(every=steps),
        num_steps=steps,
        eval_every=steps // evaluations,
        log_every=50,
    )
