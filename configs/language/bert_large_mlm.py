"""BERT-large learns the hidden words of Wikipedia.

    python -m zoo.data.tokens wikipedia/20230601.en data/wikipedia \
        --tokenizer vocab.txt --separator "[SEP]"
    python train.py configs/language/bert_large_mlm.py
    zoo plan configs/language/bert_large_mlm.py --topology v5e:16x16

The recipe is that of RoBERTa (Liu et al., arXiv 1907.11692, table 9, the large model), which is
BERT-large without the next sentence: 8192 windows of 512 tokens a step, hidden anew each time. They
also read books, and had 50,000 byte pairs; here it is Wikipedia and BERT's own 30,522 word pieces.
"""

from zoo.data import Data
from zoo.data.text import MaskTokens
from zoo.data.tokens import Tokens
from zoo.tasks import MaskedLanguageModelling
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig

BATCH, LENGTH, VOCABULARY = 8192, 512, 30522
CLS, SEP = 101, 102


def get_config() -> TrainConfig:
    """The configuration."""
    windows = {"path": "data/wikipedia", "length": LENGTH, "first": (CLS,), "last": (SEP,)}
    masking = (MaskTokens(VOCABULARY),)
    return TrainConfig(
        model=Model("bert_large_uncased_mlm", {"scan_layers": True}),
        task=MaskedLanguageModelling(),
        data=Data(
            train=Tokens(**windows),
            eval=Tokens(**windows, split="eval"),
            train_transforms=masking,
            eval_transforms=masking,
            batch_size=BATCH,
            eval_batch_size=1024,
            threads=16,
        ),
        optimizer=Optimizer(
            learning_rate=4e-4,
            schedule="linear",
            warmup_steps=30_000,
            weight_decay=0.01,
            b2=0.98,
            eps=1e-6,
        ),
        partition=Partition(fsdp=16, remat="full"),
        precision="bfloat16",
        checkpoint=Checkpointing(every=5000),
        num_steps=500_000,
        eval_every=5000,
    )
