"""GLA with 1.3 thousand million parameters learns English web text.

    python -m zoo.data.tokens c4/en data/c4 --tokenizer mistral.json --separator "</s>"
    python train.py configs/language/gla_1b3.py
    zoo plan configs/language/gla_1b3.py --topology v5e:16x16

The recipe is that of the paper (arXiv 2312.06635): 100 thousand million tokens in windows of 2048,
2 million a step. They read SlimPajama, which TFDS does not have: C4, which it has, takes its place.
The tokenizer is Mistral's of 32,000 tokens, as theirs.
"""

from zoo.data import Data
from zoo.data.tokens import Tokens
from zoo.tasks import LanguageModelling
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig

BATCH, LENGTH = 1024, 2048
STEPS = 100_000_000_000 // (BATCH * LENGTH)


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model("gla_1.3b", {"scan_layers": True}),
        task=LanguageModelling(),
        data=Data(
            train=Tokens("data/c4", LENGTH),
            eval=Tokens("data/c4", LENGTH, "eval"),
            batch_size=BATCH,
        ),
        optimizer=Optimizer(
            learning_rate=3e-4,
            warmup_steps=STEPS // 100,
            final_fraction=0.1,
            weight_decay=0.01,
            clip=1.0,
        ),
        partition=Partition(fsdp=64, remat="full"),
        precision="bfloat16",
        checkpoint=Checkpointing(every=1000, metric="loss", mode="min"),
        num_steps=STEPS,
        eval_every=1000,
    )
