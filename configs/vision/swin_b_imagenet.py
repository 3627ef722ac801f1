"""Swin-B learns ImageNet-1K from nothing.

    python train.py configs/vision/swin_b_imagenet.py
    zoo plan configs/vision/swin_b_imagenet.py --topology v5e:16x16

The recipe is the official one (`swin_base_patch4_window7_224.yaml` of microsoft/Swin-Transformer):
300 epochs in batches of 1024; expected top-1 83.5 %.
"""

from zoo.data.imagenet import TRAIN_IMAGES, imagenet
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig

BATCH = 1024
EPOCH = TRAIN_IMAGES // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model("swin_base_patch4_window7_224", {"drop_path": 0.5}),
        task=Classification(label_smoothing=0.1),
        data=imagenet(BATCH, erase=0.25),
        optimizer=Optimizer(
            learning_rate=5e-4 * BATCH / 512,
            warmup_steps=20 * EPOCH,
            initial_fraction=1e-3,
            final_fraction=1e-2,
            weight_decay=0.05,
            clip=5.0,
        ),
        partition=Partition(fsdp=16),
        precision="bfloat16",
        checkpoint=Checkpointing(every=5 * EPOCH),
        num_steps=300 * EPOCH,
        eval_every=5 * EPOCH,
    )
