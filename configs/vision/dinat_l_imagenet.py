"""DiNAT-L, trained on ImageNet-22K, is fine-tuned on ImageNet-1K.

    python train.py configs/vision/dinat_l_imagenet.py
    zoo plan configs/vision/dinat_l_imagenet.py --topology v5e:16x16

The recipe is the official one (`dinat_large.yml` of SHI-Labs/Neighborhood-Attention-Transformer):
30 epochs, 64 images on each of 8 devices, a rate that falls linearly, no mixing, from their file,
which must be here; expected top-1 86.6 %.
"""

from zoo.data.imagenet import TRAIN_IMAGES, imagenet
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig

BATCH = 512
EPOCH = TRAIN_IMAGES // BATCH


def get_config() -> TrainConfig:
    """The configuration."""
    return TrainConfig(
        model=Model("dinat_large", checkpoint="dinat_large_in22k_224.pth", adapt=True),
        task=Classification(label_smoothing=0.1),
        data=imagenet(BATCH, mixup=0.0, cutmix=0.0, erase=0.25),
        optimizer=Optimizer(learning_rate=5e-5, schedule="linear", weight_decay=1e-4),
        partition=Partition(fsdp=16),
        precision="bfloat16",
        checkpoint=Checkpointing(every=EPOCH),
        num_steps=30 * EPOCH,
        eval_every=EPOCH,
    )
