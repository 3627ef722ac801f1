"""Language models of bytes: bits for each byte beside counting, and a text to read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.evaluators.evaluator import Evaluator


@dataclass(frozen=True)
class ByteTexts(Evaluator):
    """`sample.txt`, bits per byte of the held-out windows, and those of a model that counts.

    The numbers are `bits_per_byte` and `bits_per_byte_5gram` (of `zoo.data.ngrams`, which has
    counted the training documents), both over all bytes but the first of each window.

    Attributes:
      every: steps between runs; 0 is at the end only.
      prompt: what the sample continues.
      length: bytes of the sample.
      temperature: of its draws.
      order: bytes of the longest counted run.
    """

    every: int = 0
    prompt: str = "Fellow citizens of the Senate and the House: "
    length: int = 64
    temperature: float = 0.7
    order: int = 5

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Measure, and print and write a sample."""
        import jax

        from zoo.data.ngrams import NGram
        from zoo.inference import Draw, Temperature, generate

        loss = float(program.evaluate(variables)["loss"])
        counted = NGram(data.train.documents, self.order)
        windows = (data.eval[i]["tokens"].astype(np.uint8) for i in range(len(data.eval)))
        bits = np.concatenate([counted.bits(window) for window in windows])
        prompt = np.frombuffer(self.prompt.encode(), np.uint8)[None].astype(np.int32)
        said = generate(
            program.networks,
            variables,
            prompt,
            steps=self.length,
            rng=jax.random.key(0),
            sampler=Draw(Temperature(self.temperature)),
        )
        text = self.prompt + bytes(np.asarray(said[0], np.uint8)).decode(errors="replace")
        (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
        return {
            "bits_per_byte": loss / math.log(2),
            f"bits_per_byte_{self.order}gram": float(bits.mean()),
        }
