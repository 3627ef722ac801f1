"""Video Swin-T tells what a driver does, from a folder of clips.

    python train.py configs/video/video_swin_driver.py \
        --data.train.path CLIPS/train --data.eval.path CLIPS/test \
        --model.checkpoint swin_tiny_patch244_window877_kinetics400_1k.pth

CLIPS/train/<class>/<video> are video files (`pip install av`) or folders of frames. Nine classes,
as the Driver Monitoring Dataset has for distraction; 32 frames, every second one, 224 pixels;
50 epochs as the paper says (of 1,000 clips: adjust `--num-steps` to yours). The paper's variant,
clip length and split are not published, so its figure (97.5 %) is not this recipe's. The optimizer
is the official fine-tuning's of Kinetics. `zoo.data.video.slide` runs the trained model over a
long video.
"""

from zoo.data import Data
from zoo.data.transforms import CenterCrop, Normalize, RandomFlip, RandomResizedCrop, Resize
from zoo.data.video import ClipFolder, EachFrame, SampleClip
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

EPOCHS, BATCH, CLIPS = 50, 64, 1000
STEPS = EPOCHS * CLIPS // BATCH
SIZE = (224, 224)


def get_config() -> TrainConfig:
    """The configuration."""
    scale = Normalize()
    return TrainConfig(
        model=Model("video_swin_driver", adapt=True),
        task=Classification(),
        data=Data(
            train=ClipFolder("data/driver/train"),
            eval=ClipFolder("data/driver/test"),
            train_transforms=(
                SampleClip(32, 2),
                EachFrame(RandomResizedCrop(SIZE)),
                EachFrame(RandomFlip()),
                EachFrame(scale),
            ),
            eval_transforms=(
                SampleClip(32, 2, random=False),
                EachFrame(Resize(256, "bilinear")),
                EachFrame(CenterCrop(SIZE)),
                EachFrame(scale),
            ),
            batch_size=BATCH,
            eval_batch_size=16,
        ),
        optimizer=Optimizer(
            learning_rate=3e-4, warmup_steps=STEPS // 12, weight_decay=0.02, clip=40.0
        ),
        checkpoint=Checkpointing(every=STEPS // 10),
        num_steps=STEPS,
        eval_every=STEPS // 10,
        precision="bfloat16",
    )
