"""Swin-L, trained on ImageNet-22K, is fine-tuned on ImageNet-1K.

    python train.py configs/vision/swin_l_imagenet.py
    zoo plan configs/vision/swin_l_imagenet.py --topology v5e:16x16

The recipe is the official one (`swin_large_patch4_window7_224_22kto1k_finetune.yaml` of
microsoft/Swin-Transformer): 30 epochs in batches of 1024, from their file, which must be here;
expected top-1 86.3 %.
"""

from zoo.data.imagenet import TRAIN_IMAGES, imagenet
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig

BATCH = 1024
EPOCH = TRAIN_IMAGES // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model(
            "swin_large_patch4_window7_224_22kto1k",
            {"drop_path": 0.2},
            checkpoint="swin_large_patch4_window7_224_22k.pth",
            adapt=True,
        ),
        task=Classification(label_smoothing=0.1),
        data=imagenet(BATCH, erase=0.25),
        optimizer=Optimizer(
            learning_rate=2e-5 * BATCH / 512,
            warmup_steps=5 * EPOCH,
            initial_fraction=1e-3,
            final_fraction=1e-2,
            weight_decay=1e-8,
            clip=5.0,
        ),
        partition=Partition(fsdp=16),
        precision="bfloat16",
        checkpoint=Checkpointing(every=EPOCH),
        num_steps=30 * EPOCH,
        eval_every=EPOCH,
    )
