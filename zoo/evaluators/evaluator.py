"""What an evaluator is: a measure, or a picture, of whole data sets rather than of a batch.

Metrics of a task are means over examples. What is not (a rank over all scores, an interval, a grid
of samples, a forecast drawn against the truth) is an evaluator, named in `TrainConfig.evaluators`:

    @dataclass(frozen=True)
    class Samples(Evaluator):
        every: int = 500

        def run(self, program, variables, data, folder):
            ...
            return {"distance": distance}

What it returns stands beside the metrics of that evaluation: in the log, the table, `eval.py` and
as `checkpoint.metric`. Evaluators run on one process.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from zoo.data import Data
    from zoo.training.program import Program


class Evaluator:
    """The contract.

    Attributes:
      every: steps between runs, each with the evaluation of that step; 0 is at the end only.
    """

    every: int = 0

    def run(
        self, program: "Program", variables: Mapping[str, Any], data: "Data", folder: Path
    ) -> dict[str, float]:
        """Measure, draw into `folder`, and give the numbers by name.

        Args:
          program: has the networks, the task, and `predict(variables, batch)`, compiled.
          variables: of the networks, as the task takes them.
          data: of the config.
          folder: the run directory.
        """
        raise NotImplementedError(f"{type(self).__name__} has no run")


def some_examples(data: "Data", places: list[int]) -> "dict[str, np.ndarray]":
    """The held-out examples of these numbers, as one batch."""
    import dataclasses

    from zoo.data import eval_batches

    some = dataclasses.replace(
        data, eval=[data.eval[i] for i in places], eval_batch_size=len(places)
    )
    return next(eval_batches(some))


def predictions(
    program: "Program", variables: Mapping[str, Any], data: "Data"
) -> "Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]":
    """Batches of the held-out examples and what the task says of them, padding left out."""
    import jax

    from zoo.data import eval_batches

    for batch in eval_batches(data):
        valid = batch["valid"]
        said = jax.device_get(program.predict(variables, batch))
        yield (
            {name: x[valid] for name, x in batch.items()},
            {name: x[valid] for name, x in said.items()},
        )
