"""Documents of different lengths, several to a row, without padding between them.

    source = Packed(documents, length=128)      # examples `tokens` and `segments`

`segments` numbers the documents of a row from 1, 0 is the padding at its end. A model that takes
them keeps each document to itself; `LanguageModelling` predicts no token from another document.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which documents share a row: the longest first, each into the fullest row that has room.

    Args:
      lengths: of the documents, each from 1 to `room`.
      room: tokens of a row.

    Returns:
      For each row the numbers of its documents.

    Raises:
      ValueError: if a document does not fit into any row.
    """
    if wrong := [n for n in lengths if not 1 <= n <= room]:
        raise ValueError(f"A document of {wrong[0]} tokens does not fit into rows of {room}.")
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # tokens that are left -> rows
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = next((n for n in range(lengths[i], room + 1) if by_room.get(n)), None)
        if left is None:
            row, left = len(rows), room
            rows.append([])
        else:
            row = by_room[left].pop()
        rows[row].append(i)
        by_room.setdefault(left - lengths[i], []).append(row)
    return rows


@dataclass(frozen=True)
class Packed:
    """Rows of `length` tokens of whole documents; one that is longer is cut into pieces.

    Attributes:
      documents: tokens of each, as integers or bytes.
      length: of a row.
    """

    documents: Sequence[Sequence[int]]
    length: int

    @functools.cached_property
    def _pieces(self) -> list[np.ndarray]:
        every = (
            np.frombuffer(d, np.uint8) if isinstance(d, bytes) else np.asarray(d)
            for d in self.documents
        )
        return [
            row[i : i + self.length].astype(np.int32)
            for row in every
            for i in range(0, len(row), self.length)
        ]

    @functools.cached_property
    def _rows(self) -> list[list[int]]:
        return pack([len(piece) for piece in self._pieces], self.length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens, segments = np.zeros((2, self.length), np.int32)
        start = 0
        for number, i in enumerate(self._rows[index], 1):
            piece = self._pieces[i]
            tokens[start : start + len(piece)] = piece
            segments[start : start + len(piece)] = number
            start += len(piece)
        return {"tokens": tokens, "segments": segments}
