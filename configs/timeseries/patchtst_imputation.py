"""A small PatchTST says what a quarter of the values of four days of network traffic were.

    python train.py configs/timeseries/patchtst_imputation.py

The series and the splits are those of `configs/timeseries/itransformer.py`. Values are hidden one
by one, anew in each window that is trained on, and always the same ones in the held-out windows.
1,000 steps, a minute on two CPU cores; expected on hidden scaled values of all test windows:

    MSE    MAE
    0.56   0.49    this
    0.61   0.49    a line between the neighbours that were seen
    1.20   0.81    the mean of what was seen of the series in its window
"""

from zoo.data import Data
from zoo.data.series import HideValues, Windows, network_traffic
from zoo.tasks import Imputation
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

CONTEXT, STEPS = 96, 1000


def get_config() -> TrainConfig:
    """The configuration."""
    table = network_traffic()
    return TrainConfig(
        model=Model(
            "patchtst_test",
            {
                "context_length": CONTEXT,
                "horizon": CONTEXT,
                "variates": len(table.variates),
                "patch_length": 16,
                "stride": 8,
                "embed_dim": 64,
                "mlp_dim": 128,
                "masked": True,
            },
        ),
        task=Imputation(),
        data=Data(
            train=Windows(table, "train", CONTEXT, 0, time_features=None),
            eval=Windows(table, "val", CONTEXT, 0, time_features=None),
            test=Windows(table, "test", CONTEXT, 0, time_features=None),
            train_transforms=(HideValues(0.25),),
            eval_transforms=(HideValues(0.25, seed=0),),
            batch_size=32,
            eval_batch_size=64,
        ),
        optimizer=Optimizer(
            name="adam", learning_rate=3e-3, schedule="one_cycle", initial_fraction=0.04
        ),
        checkpoint=Checkpointing(every=STEPS),
        num_steps=STEPS,
        eval_every=STEPS // 4,
        log_every=50,
    )
