"""What a call costs with the methods of a run, and without them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.evaluators.evaluator import Evaluator, some_examples


@dataclass(frozen=True)
class Operations(Evaluator):
    """Multiply-adds of a call (twice their number, FLOPs), of one held-out example as it is padded.

    A product with masked weights costs what it did, and is counted. What masks of
    `zoo.methods.gtsp` leave is given beside it.

    Attributes:
      every: steps of training between counts; 0 is at the end only.
    """

    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """`flops` and `plain_flops`; `heads_kept` and `weights_kept`, where there are masks."""
        import jax
        from flax.traverse_util import flatten_dict

        from zoo.methods.gtsp import COLLECTION
        from zoo.planning.flops import count_flops
        from zoo.tasks.apply import model_inputs

        batch = some_examples(data, [0])

        def cost(network: Any, variables: Any) -> float:
            call = jax.make_jaxpr(lambda v, x: network.apply(v, **x))
            return count_flops(call(variables, model_inputs(network, batch)), "cpu")

        plain = jax.eval_shape(lambda: program.task.init(program.base, jax.random.key(0)))
        found = {
            "flops": cost(program.networks, dict(variables)),
            "plain_flops": cost(program.base, plain),
        }
        masks = flatten_dict(dict(variables.get(COLLECTION, {})))
        for name, leaf in (("heads_kept", "heads"), ("weights_kept", "kernel")):
            some = [mask for path, mask in masks.items() if path[-1] == leaf]
            if some:
                found[name] = sum(float(m.sum()) for m in some) / sum(m.size for m in some)
        return found
