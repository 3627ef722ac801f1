"""Text as one long row of tokens on disk, read in windows.

    python -m zoo.data.tokens c4/en /data/c4 --tokenizer tokenizer.json --separator "</s>"

writes the texts of a prepared TFDS set, one after the other with a separator between them, as
`tokens.bin` and `tokens.json` (how many, of which type). `Tokens` maps the file and gives windows
of one length: no padding, no document read twice in an epoch, and access in any order.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from zoo.data.text import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Windows of `length` tokens of a folder that `write_tokens` made.

    Attributes:
      path: the folder.
      length: of a window, with `first` and `last`.
      split: `train`, or `eval`: the last `held_out` windows.
      held_out: how many windows are not in `train`.
      first: put before the tokens of every window, such as the id of `[CLS]`.
      last: put behind them.
    """

    path: str
    length: int
    split: str = "train"
    held_out: int = 4096
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    def __post_init__(self):
        if self.split not in ("train", "eval"):
            raise ValueError(f"split is {self.split!r}; choose 'train' or 'eval'.")
        if self.inner < 1:
            raise ValueError(f"length={self.length} leaves no room for tokens; make it longer.")

    @property
    def inner(self) -> int:
        """Tokens of the text in a window."""
        return self.length - len(self.first) - len(self.last)

    def example(self) -> dict[str, Any]:
        """Zeros in the form of an example, for which the folder need not be there."""
        return {"tokens": np.zeros(self.length, np.int32)}

    @functools.cached_property
    def _row(self) -> np.ndarray:
        folder = Path(self.path)
        try:
            about = json.loads((folder / "tokens.json").read_text())
            row = np.memmap(folder / "tokens.bin", np.dtype(about["type"]), "r")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"There are no tokens in {self.path!r}; write them with "
                "python -m zoo.data.tokens (its --help says how)."
            ) from None
        if len(row) != about["count"]:
            raise ValueError(
                f"{self.path}/tokens.bin holds {len(row)} tokens, and tokens.json says "
                f"{about['count']}; write them again."
            )
        return row

    @functools.cached_property
    def _windows(self) -> int:
        count = len(self._row) // self.inner
        if count <= self.held_out:
            raise ValueError(
                f"{self.path} has {count} windows of {self.inner} tokens, and held_out is "
                f"{self.held_out}; hold out fewer, or write more text."
            )
        return count

    def __len__(self) -> int:
        return self._windows - self.held_out if self.split == "train" else self.held_out

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} windows, and no number {index}.")
        start = index if self.split == "train" else self._windows - self.held_out + index
        text = self._row[start * self.inner : (start + 1) * self.inner]
        return {"tokens": np.array([*self.first, *text, *self.last], np.int32)}


def write_tokens(
    texts: Iterable[str | bytes], tokenizer: Tokenizer, separator: str, folder: str | Path
) -> int:
    """Write texts as tokens, each with the separator behind it; gives how many.

    The folder is complete when `tokens.json` is there, which is written last.

    Raises:
      ValueError: if the separator is not a token of the vocabulary.
    """
    library, folder = tokenizer.library, Path(folder)
    end = library.token_to_id(separator)
    if end is None:
        raise ValueError(f"The vocabulary of {tokenizer.path} has no token {separator!r}.")
    library.no_truncation()
    kind = np.dtype(np.uint16 if library.get_vocab_size() <= 2**16 else np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(folder / "tokens.bin", "wb") as file:
        for texts_of_chunk in _chunks(texts, 1000):
            rows = library.encode_batch(texts_of_chunk, add_special_tokens=False)
            tokens = np.array([t for row in rows for t in (*row.ids, end)], kind)
            tokens.tofile(file)
            count += len(tokens)
    draft = folder / "tokens.json.tmp"
    draft.write_text(json.dumps({"type": kind.name, "count": count}) + "\n")
    os.replace(draft, folder / "tokens.json")
    return count


def _chunks(texts: Iterable[str | bytes], size: int) -> Iterator[list[str]]:
    texts = (text.decode() if isinstance(text, bytes) else str(text) for text in texts)
    while chunk := list(islice(texts, size)):
        yield chunk


def main(
    name: Annotated[str, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    tokenizer: Path,
    separator: str,
    split: str = "train",
    data_dir: str | None = None,
) -> None:
    """Write a TFDS set's texts as tokens.

    Args:
      name: of the set, prepared with --file_format=array_record.
      folder: where tokens.bin and tokens.json go.
      tokenizer: a tokenizer.json, or a vocab.txt of word pieces.
      separator: the token behind each text, such as </s> or [SEP].
      split: of the set.
      data_dir: where sets are prepared.
    """
    from zoo.data.sources import Tfds

    source = Tfds(name, split, data_dir)
    texts = (source[i]["text"] for i in range(len(source)))
    print(f"{write_tokens(texts, Tokenizer(tokenizer), separator, folder):,} tokens in {folder}")


if __name__ == "__main__":
    tyro.cli(main)
