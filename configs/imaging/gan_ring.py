"""Two small networks with an optimizer each learn a ring of eight Gaussians from each other.

    python train.py configs/imaging/gan_ring.py

A generator that collapses finds a few of the eight. 3,000 steps, two minutes on two CPU cores;
expected of 2,048 samples: all 8 modes found, 92 % of the samples within three standard
deviations of one. `modes.png` in the run directory shows them beside the truth.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.data import Data
from zoo.data.synthetic import RingOfGaussians
from zoo.evaluators import ModesFound
from zoo.layers.dense import Dense
from zoo.tasks import Adversarial
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig

LATENTS, STEPS = 8, 3000


class Generator(nn.Module):
    """Latents to points of the plane."""

    width: int = 128

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return {"latents": jax.ShapeDtypeStruct((batch_size, LATENTS), jnp.float32)}

    @nn.compact
    def __call__(
        self, latents: Float[Array, "batch latents"], train: bool = False
    ) -> Float[Array, "batch 2"]:
        """The points."""
        x = latents
        for i in range(3):
            x = nn.relu(Dense(self.width, name=f"layers_{i}")(x))
        return Dense(2, name="head")(x)


class Discriminator(nn.Module):
    """Points of the plane to a number that is large for real ones."""

    width: int = 128

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return {"points": jax.ShapeDtypeStruct((batch_size, 2), jnp.float32)}

    @nn.compact
    def __call__(
        self, points: Float[Array, "batch 2"], train: bool = False
    ) -> Float[Array, "batch 1"]:
        """The scores."""
        x = points
        for i in range(3):
            x = nn.leaky_relu(Dense(self.width, name=f"layers_{i}")(x), 0.2)
        return Dense(1, name="head")(x)


def get_config() -> TrainConfig:
    """The configuration."""
    adam = Optimizer(name="adam", learning_rate=1e-3, b1=0.5, b2=0.9)
    return TrainConfig(
        model={
            "generator": Model(f"{__file__}:Generator"),
            "discriminator": Model(f"{__file__}:Discriminator"),
        },
        task=Adversarial(r1=0.1),
        data=Data(
            train=RingOfGaussians(100_000, latent_dim=LATENTS),
            eval=RingOfGaussians(2048, latent_dim=LATENTS, seed=1),
            batch_size=256,
            eval_batch_size=512,
        ),
        optimizer={"generator": adam, "discriminator": adam},
        evaluators=(ModesFound(),),
        checkpoint=Checkpointing(metric="modes"),
        num_steps=STEPS,
        log_every=100,
        ema_decay=0.995,
    )
