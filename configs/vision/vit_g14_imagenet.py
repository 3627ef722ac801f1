"""ViT-g/14, of a thousand million parameters, learns ImageNet-1K from nothing.

    python train.py configs/vision/vit_g14_imagenet.py
    zoo plan configs/vision/vit_g14_imagenet.py --topology v5e:16x16

The model is that of Zhai et al., "Scaling Vision Transformers", arXiv 2106.04560, table 2, who
trained it on images that are not public. On ImageNet-1K alone there is no published run of it: this
is the recipe that He et al., arXiv 2111.06377, table 11, give for ViT-L and ViT-H (83.1 % top-1).
"""

from zoo.data.imagenet import TRAIN_IMAGES, imagenet
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig

BATCH = 4096
EPOCH = TRAIN_IMAGES // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    model = {
        "patch_size": 14,
        "embed_dim": 1408,
        "depth": 40,
        "num_heads": 16,
        "mlp_ratio": 6144 / 1408,
        "drop_path": 0.2,
        "scan_layers": True,
    }
    return TrainConfig(
        model=Model("vit_large_patch16_224", model),
        task=Classification(label_smoothing=0.1),
        data=imagenet(BATCH),
        optimizer=Optimizer(
            learning_rate=1e-4 * BATCH / 256,
            warmup_steps=20 * EPOCH,
            weight_decay=0.3,
            b2=0.95,
        ),
        partition=Partition(fsdp=64, remat="full"),
        precision="bfloat16",
        ema_decay=0.9999,
        checkpoint=Checkpointing(every=5 * EPOCH),
        num_steps=200 * EPOCH,
        eval_every=5 * EPOCH,
    )
