"""A small BERT learns the hidden words of periodic text.

    python train.py configs/language/bert_mlm_toy.py

4,096 sequences of 32 tokens that repeat their first four, and 512 held out; masked as BERT masks.
About 20 seconds on two CPU cores; expected accuracy on hidden tokens of the held-out ones 100 %.
"""

from zoo.data import Data
from zoo.data.synthetic import PeriodicText
from zoo.data.text import MaskTokens
from zoo.tasks import MaskedLanguageModelling
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, BATCH = 400, 64
VOCABULARY, LENGTH, MASK = 32, 32, 0  # the token MASK is not in the text


def get_config() -> TrainConfig:
    """The configuration."""
    masking = (MaskTokens(VOCABULARY, mask_token=MASK, special=(MASK,)),)
    return TrainConfig(
        model=Model(
            "bert_test",
            {
                "head": "masked_lm",
                "pooler": False,
                "vocab_size": VOCABULARY,
                "embed_dim": 64,
                "mlp_dim": 128,
                "max_positions": LENGTH,
                "dropout": 0.0,
                "attention_dropout": 0.0,
            },
        ),
        task=MaskedLanguageModelling(),
        data=Data(
            train=PeriodicText(4096, LENGTH, vocab_size=VOCABULARY),
            eval=PeriodicText(512, LENGTH, vocab_size=VOCABULARY, seed=1),
            train_transforms=masking,
            eval_transforms=masking,
            batch_size=BATCH,
            eval_batch_size=128,
        ),
        optimizer=Optimizer(
            learning_rate=4e-3,
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
