"""An LSTM on the memory task of `gtrxl_memory.py`, to stand beside the gated transformer.

    python train.py configs/control/lstm_memory.py
    python train.py configs/control/gtrxl_memory.py --model.overrides.gated False

Same worlds, same updates, as wide as the transformer; the second command takes the gates out of the
transformer, and with `--model.overrides.reordered False` too it is the Transformer-XL before GTrXL.
`benchmarks/memory.py` draws the learning curves of all of them in one picture. Measured in the same
200 steps: the LSTM 0.527, both transformers without gates 1.000 from step 20 on.
"""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.layers.dense import Dense
from zoo.training import Model, TrainConfig
from zoo.training.config import load_file


class LSTM(nn.Module):
    """An embedding, an LSTM and a head, with the `init_state` and `step` of agents."""

    observation_dim: int = 4
    width: int = 32
    outputs: int = 3

    def setup(self) -> None:
        """The parts."""
        self.embed, self.head = Dense(self.width), Dense(self.outputs)
        self.cell = nn.OptimizedLSTMCell(self.width)

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, 8, self.observation_dim)
        return {"observations": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def init_state(self, batch: int, length: int = 0) -> Float[Array, "batch 2 width"]:
        """An empty memory."""
        return jnp.zeros((batch, 2, self.width))

    def __call__(
        self, observations: Float[Array, "batch length dims"], train: bool = False
    ) -> Float[Array, "batch length outputs"]:
        """The output at each observation of a first segment."""
        return self.step(self.init_state(len(observations)), observations)[1]

    def step(
        self,
        state: Float[Array, "batch 2 width"],
        observations: Float[Array, "batch length dims"],
        reset: Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> tuple[Array, Float[Array, "batch length outputs"]]:
        """Go on with a segment; where `reset` is True an episode begins."""
        if reset is None:
            reset = jnp.zeros(observations.shape[:2], bool)

        def one(cell: nn.Module, state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            x, first = inputs
            state = jnp.where(first[:, None, None], 0, state)
            (c, h), y = cell((state[:, 0], state[:, 1]), x)
            return jnp.stack([c, h], 1), y

        over = nn.scan(
            one, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )
        state, y = over(self.cell, state, (nn.relu(self.embed(observations)), reset))
        return state, self.head(y)


def get_config() -> TrainConfig:
    """The configuration."""
    config = load_file(Path(__file__).with_name("gtrxl_memory.py"))
    return dataclasses.replace(config, model=Model(f"{__file__}:LSTM"))
