"""A model, a data set and a config that take no time: also a config file for train.py."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data import Data
from zoo.layers.partition import constrain
from zoo.tasks import Classification
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig


class Mlp(nn.Module):
    """`up`, GELU, `down`, with the zoo's names."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.width, name="up", dtype=self.dtype)(x)
        y = constrain(nn.gelu(y), "batch", "length", "mlp")
        return nn.Dense(x.shape[-1], name="down", dtype=self.dtype)(y)


class Tiny(nn.Module):
    """Patches, residual MLPs (one), a mean and a head."""

    image_size: tuple[int, int] = (4, 4)
    width: int = 16
    hidden: int = 32
    num_classes: int = 4
    depth: int = 1
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size=1):
        return {"images": jax.ShapeDtypeStruct((batch_size, *self.image_size, 1), jnp.float32)}

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(images.shape[0], -1, self.image_size[1])
        x = nn.Dense(self.width, name="embed", dtype=self.dtype)(x)
        x = x + self.param("position_embedding", nn.initializers.normal(0.1), (1, *x.shape[1:]))
        x = constrain(x, "batch", "length", "channels")
        for more in ("", *(f"_{i}" for i in range(1, self.depth))):
            y = nn.LayerNorm(name=f"norm1{more}")(x)
            x = x + Mlp(self.hidden, self.dtype, name=f"mlp{more}")(y)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = nn.LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(self.num_classes, name="head", dtype=self.dtype)(x)


@dataclass(frozen=True)
class Blobs:
    """Noisy images of four kinds, made from the index."""

    split: str = "train"
    size: int = 64
    broken_at: int = -1  # an example that is all NaN

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng([index, self.split == "train"])
        label = index % 4
        image = np.full((4, 4, 1), label / 4) + 0.1 * rng.normal(size=(4, 4, 1))
        image = image * np.nan if index == self.broken_at else image
        return {"image": image.astype(np.float32), "label": np.int32(label)}


def get_config() -> TrainConfig:
    return TrainConfig(
        model=Model(f"{__file__}:Tiny", {"dropout": 0.1}),
        task=Classification(),
        data=Data(Blobs(), Blobs("test", 22), batch_size=16, eval_batch_size=8, threads=1),
        optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.01, clip=1.0),
        checkpoint=Checkpointing(every=4),
        num_steps=12,
        eval_every=6,
        log_every=1,
        ema_decay=0.9,
        compilation_cache=None,
    )
