"""Next tokens by steps down an energy: what energy-based transformers learn.

loss = the mean over the steps of the cross-entropy of the next token       (or the last step's)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array

from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


@dataclass(frozen=True)
class Refinement(OneNetwork):
    """Batches hold `tokens`; each but the first is predicted from those before it.

    Metrics are the loss, the cross-entropy behind the first and the last step, and how far the
    energy falls between them. If a batch has `entropy` (of the source, at each row), it is given
    beside them: no model can do better on average.

    Attributes:
      last_only: only the last step counts.
    """

    last_only: bool = False
    method: ClassVar[str] = "features"

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Of the steps that `EBT.features` gives."""
        refined = output["refined"][:, :, :-1].astype(jnp.float32)
        targets = jnp.broadcast_to(batch["tokens"][:, None, 1:], refined.shape[:-1])
        each = optax.softmax_cross_entropy_with_integer_labels(refined, targets).mean(-1)
        loss = each[:, -1] if self.last_only else each.mean(1)
        energy = output["energy"][:, :, :-1].astype(jnp.float32).mean(-1)
        found = {
            "loss": loss,
            "first_step": each[:, 0],
            "last_step": each[:, -1],
            "energy_fall": energy[:, 0] - energy[:, -1],
        }
        if "entropy" in batch:
            found["source_entropy"] = batch["entropy"]
        return {name: Mean.of(value, batch.get("valid")) for name, value in found.items()}

    def predict(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Logits of the next tokens, and the energy behind every step."""
        output, _ = self.run(networks, variables, batch)
        return {"logits": output["logits"], "energy": output["energy"],
                "refined": output["refined"]}  # fmt: skip
