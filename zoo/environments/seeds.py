"""What a run on environments has for data: a number for each world."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seeds:
    """Examples `world`: their own number, from which held-out worlds are made.

    Attributes:
      count: how many.
    """

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.int32]:
        return {"world": np.int32(index)}
