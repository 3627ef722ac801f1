"""ViT-L/16 learns ImageNet-1K from nothing.

    python train.py configs/vision/vit_l16_imagenet.py
    zoo plan configs/vision/vit_l16_imagenet.py --topology v5e:16x16

The recipe is that of He et al., "Masked Autoencoders", arXiv 2111.06377, table 11, for ViT-L
supervised from scratch: 200 epochs in batches of 4096; expected top-1 82.6 %, with the average of
the parameters. (Their models start from Xavier weights, ours from normal ones of 0.02.)
"""

from zoo.data.imagenet import TRAIN_IMAGES, imagenet
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig

BATCH = 4096
EPOCH = TRAIN_IMAGES // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model("vit_large_patch16_224", {"drop_path": 0.2, "scan_layers": True}),
        task=Classification(),
        data=imagenet(BATCH),
        optimizer=Optimizer(
            learning_rate=1e-4 * BATCH / 256,
            warmup_steps=20 * EPOCH,
            weight_decay=0.3,
            b2=0.95,
        ),
        partition=Partition(fsdp=16),
        precision="bfloat16",
        ema_decay=0.9999,
        checkpoint=Checkpointing(every=5 * EPOCH),
        num_steps=200 * EPOCH,
        eval_every=5 * EPOCH,
    )
