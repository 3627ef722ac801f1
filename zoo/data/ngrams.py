"""How well counting does: a model of bytes from the few that stand before each.

Interpolated as Witten and Bell do (IEEE Transactions on Information Theory 37, 1991). With c(h w)
how often byte w followed history h, T(h) how many different bytes did, and h' without the oldest
byte of h:

    p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h));   at last 1 / 256
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8


class NGram:
    """Counts of all runs of up to `order` bytes.

    Attributes:
      order: bytes of a run, the one that is said included; at most 7.
    """

    def __init__(self, documents: Iterable[bytes], order: int = 5) -> None:
        """Count.

        Args:
          documents: no run goes from one to the next.
          order: see the class.
        """
        if not 1 <= order <= 7:
            raise ValueError(f"order={order} should be 1 to 7.")
        self.order = order
        rows = [np.frombuffer(text, np.uint8) for text in documents]
        self._runs = []
        for n in range(1, order + 1):
            runs, counts = np.unique(
                np.concatenate([_runs(row, n) for row in rows]), return_counts=True
            )
            histories, first = np.unique(runs >> np.uint64(8), return_index=True)
            total = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(runs)))
            self._runs.append((runs, counts, histories, total, kinds))

    def bits(self, row: UInt8[np.ndarray, "length"]) -> Float[np.ndarray, "length-1"]:
        """Minus the logarithm (to base 2) of the probability of every byte but the first."""
        p = np.full(len(row) - 1, 1 / 256)
        for n, (runs, counts, histories, total, kinds) in enumerate(self._runs, 1):
            found = _runs(row, n)[1 if n == 1 else 0 :]
            c, _ = _looked_up(runs, found, counts, counts)
            h, t = _looked_up(histories, found >> np.uint64(8), total, kinds)
            late = p[len(p) - len(found) :]
            known = h > 0
            p[len(p) - len(found) :] = np.where(known, (c + t * late) / np.maximum(h + t, 1), late)
        return -np.log2(p)


def _runs(row: np.ndarray, n: int) -> np.ndarray:
    """Each run of n bytes as one number, the last byte lowest."""
    count = max(len(row) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = (total << np.uint64(8)) | row[i : i + count].astype(np.uint64)
    return total


def _looked_up(keys, wanted, *values) -> list[np.ndarray]:
    """The values of the wanted keys, 0 where there are none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[at] == wanted
    return [np.where(there, value[at], 0) for value in values]
