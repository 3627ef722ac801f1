"""A small Swin Transformer learns Fashion-MNIST, read through a TFDS builder.

    apt-get install dataset-fashion-mnist
    python train.py configs/vision/swin_fashion_mnist.py

60,000 images to learn from and 10,000 held out, 28x28 pixels, padded to 32x32. 1,400
steps, three to four minutes on two CPU cores; expected accuracy on the held-out images 86 % (86.4 %
measured): three passes over the data.
"""

from zoo.data import Data
from zoo.data.fashion_mnist import FashionMnist
from zoo.data.transforms import CenterCrop, Normalize, RandomCrop, RandomFlip
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

STEPS, BATCH, SIZE = 1400, 128, (32, 32)


def get_config() -> TrainConfig:
    """The configuration."""
    scale = Normalize((0.286,), (0.353,))
    return TrainConfig(
        model=Model(
            "swin_test",
            {
                "image_size": SIZE,
                "in_channels": 1,
                "patch_size": 4,
                "embed_dim": 48,
                "num_heads": (3, 6),
            },
        ),
        task=Classification(label_smoothing=0.1),
        data=Data(
            train=FashionMnist("train"),
            eval=FashionMnist("test"),
            train_transforms=(RandomCrop(SIZE, 2), RandomFlip(), scale),
            eval_transforms=(CenterCrop(SIZE), scale),
            batch_size=BATCH,
            eval_batch_size=500,
        ),
        optimizer=Optimizer(
            learning_rate=3e-3,
            schedule="one_cycle",
            initial_fraction=0.04,
            weight_decay=0.05,
            clip=1.0,
        ),
        checkpoint=Checkpointing(every=STEPS // 4),
        num_steps=STEPS,
        eval_every=STEPS // 4,
        log_every=50,
    )
