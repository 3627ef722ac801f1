"""ImageNet, as the published recipes feed it."""

from collections.abc import Callable

from zoo.data.loader import Data
from zoo.data.randaugment import RandAugment
from zoo.data.sources import Tfds
from zoo.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    MixPairs,
    Normalize,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    Resize,
)

TRAIN_IMAGES = 1_281_167
SHAPES = {"image": (256, 256, 3), "label": ()}


def imagenet(
    batch_size: int,
    size: int = 224,
    *,
    augment: Callable | None = None,
    erase: float = 0.0,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    crop: float = 0.875,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    threads: int = 32,
) -> Data:
    """ImageNet-1K with the augmentation of DeiT, Swin and MAE's supervised runs.

    TFDS reads `imagenet2012` from where it was prepared (`tfds build imagenet2012
    --file_format=array_record`, from the two archives of image-net.org).

    Args:
      batch_size: images a step, over all processes.
      size: height and width.
      augment: what is done to the cropped and flipped image; None: RandAugment.
      erase: probability of erasing a rectangle.
      mixup: alpha of mixing; 0: never.
      cutmix: alpha of exchanging rectangles; 0: never.
      crop: part of the shorter side that evaluation sees.
      mean: of the colours.
      std: of the colours.
      threads: that decode and transform, on each host.
    """
    scale, whole = Normalize(mean, std), (size, size)
    mixing = mixup > 0 or cutmix > 0
    return Data(
        train=Tfds("imagenet2012", "train", shapes=SHAPES),
        eval=Tfds("imagenet2012", "validation", shapes=SHAPES),
        train_transforms=(
            RandomResizedCrop(whole),
            RandomFlip(),
            augment or RandAugment(),
            scale,
            *((RandomErasing(erase),) if erase else ()),
        ),
        eval_transforms=(Resize(round(size / crop)), CenterCrop(whole), scale),
        pair_transforms=(MixPairs(1000, mixup, cutmix),) if mixing else (),
        batch_size=batch_size,
        threads=threads,
    )
