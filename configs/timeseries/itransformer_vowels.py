"""A small iTransformer says who of nine speakers uttered a vowel.

    python train.py configs/timeseries/itransformer_vowels.py

JapaneseVowels of the UEA archive: 12 coefficients of 7 to 29 frames, 270 utterances to train on and
370 held out, from the package aeon, whose files are read without importing it
(`pip install --no-deps aeon==1.6.0`). A token is a coefficient. 400 steps, a quarter of a minute on
two CPU cores; expected held-out accuracy: 0.98 (0.981, 0.984 and 0.978 with three seeds).
"""

from zoo.data import Data
from zoo.data.series_archive import packaged_archive
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS = 400


def get_config() -> TrainConfig:
    """The configuration."""
    train, test = packaged_archive("JapaneseVowels")
    return TrainConfig(
        model=Model(
            "itransformer_test",
            {
                "context_length": train.length,
                "variates": 12,
                "time_features": 0,
                "num_classes": len(train.classes),
                "embed_dim": 64,
                "mlp_dim": 128,
                "dropout": 0.3,
            },
        ),
        task=Classification(label_smoothing=0.1),
        data=Data(train=train, eval=test, batch_size=32, eval_batch_size=128),
        optimizer=Optimizer(
            name="adam", learning_rate=2e-3, schedule="one_cycle", initial_fraction=0.04, clip=4.0
        ),
        checkpoint=Checkpointing(every=STEPS),
        num_steps=STEPS,
        eval_every=STEPS // 4,
        log_every=50,
    )
