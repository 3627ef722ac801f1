"""Text for encoders: tokenizers, and sources and transforms around them.

tokenizer = Tokenizer("minilm/tokenizer.json")
embeddings = model.apply(variables, **tokenizer(["A man is eating food."]))
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.data.series.csv_file import CsvFile

if TYPE_CHECKING:
    import tokenizers

IGNORED = -100  # the label of a position that is not predicted, as in PyTorch

BYTE_PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Files of byte-level BPE, as GPT-2, RoBERTa and OPT are published: pieces, and how they merge."""

FILES = ("tokenizer.json", "vocab.txt", *BYTE_PAIRS)
"""What a folder's tokenizer is read from: the first of these that is there."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the `tokenizers` library, from a file.

    Attributes:
      path: a `tokenizer.json`, a BERT `vocab.txt` (WordPiece, uncased unless `lowercase` is
        False), a `vocab.json` with its `merges.txt` beside it (byte-level BPE; OpenAI names them
        `encoder.json` and `vocab.bpe`), or a folder that holds one of them.
      max_length: longest sequence, special tokens included; longer ones are cut.
      lowercase: of a `vocab.txt`, which does not say.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a tokenizer.
    """

    path: str | Path
    max_length: int = 512
    lowercase: bool = True

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        pad_to: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Encode texts, or (text, pair) couples, for a model's `apply`.

        Returns:
          `tokens`, `token_types` (1 for the pairs) and `mask` (True is text, False padding), each
          `[batch, length]`; the length is that of the longest row, or `pad_to` if that is longer.
        """
        if isinstance(texts, str):
            raise TypeError(f"Tokenizer takes a list of texts, not one string: [{texts!r}].")
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        rows = self.library.encode_batch(inputs)
        shape = (len(rows), max([pad_to or 0, *(len(row.ids) for row in rows)]))
        tokens = np.full(shape, self.pad_id, np.int32)
        token_types, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, row in enumerate(rows):
            n = len(row.ids)
            tokens[i, :n], token_types[i, :n], mask[i, :n] = row.ids, row.type_ids, True
        return {"tokens": tokens, "token_types": token_types, "mask": mask}

    @functools.cached_property
    def library(self) -> "tokenizers.Tokenizer":
        """The tokenizer of the library, without padding, cut at `max_length`."""
        import tokenizers

        path = Path(self.path)
        if path.is_dir():
            path = next((path / n for n in FILES if (path / n).is_file()), path / FILES[0])
        if path.name in BYTE_PAIRS.values():
            path = path.with_name(next(k for k, v in BYTE_PAIRS.items() if v == path.name))
        for file in (path, path.with_name(BYTE_PAIRS.get(path.name, path.name))):
            if not file.is_file():
                raise FileNotFoundError(
                    f"There is no tokenizer at {str(file)!r}; expected a tokenizer.json, a "
                    "vocab.txt, or a vocab.json with its merges.txt."
                )
        try:
            if path.name in BYTE_PAIRS:
                tokenizer = _byte_pairs(path)
            elif path.suffix == ".json":
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            else:
                tokenizer = _word_pieces(path, self.lowercase)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{str(path)!r} is not a tokenizer: {error}.") from None
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    @functools.cached_property
    def pad_id(self) -> int:
        """The token of padding; 0 if the vocabulary names none."""
        ids = (self.library.token_to_id(name) for name in ("[PAD]", "<pad>", "<|endoftext|>"))
        return next((i for i in ids if i is not None), 0)


def _word_pieces(path: Path, lowercase: bool) -> "tokenizers.Tokenizer":
    """BERT's tokenizer from its vocabulary, one word piece a line."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = models.WordPiece.read_file(str(path))
    library = Library(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return library


def _byte_pairs(path: Path) -> "tokenizers.Tokenizer":
    """Byte-level BPE, and what its model wants around a text.

    A `tokenizer_config.json` with `add_bos_token` puts that token in front (OPT). Otherwise a
    vocabulary with `<s>`, `</s>` and `<mask>` is RoBERTa's, which frames texts; GPT-2 adds nothing.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE.from_file(str(path), str(path.with_name(BYTE_PAIRS[path.name]))))
    config = path.with_name("tokenizer_config.json")
    how = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    front = bool(how.get("add_prefix_space", False))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=front)
    library.decoder = decoders.ByteLevel()
    begin = how.get("bos_token") if how.get("add_bos_token") else None
    begin = begin["content"] if isinstance(begin, dict) else begin
    special = ["<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    special += [str(begin)] if begin else []
    ids = {name: i for name in special if (i := library.token_to_id(name)) is not None}
    library.add_special_tokens([AddedToken(n, lstrip=n == "<mask>", special=True) for n in ids])
    around = {"<s>", "</s>"} if {"<s>", "</s>", "<mask>"} <= ids.keys() else set()
    frame = ("<s> $A </s>", "<s> $A </s> </s> $B </s>")
    if begin in ids:
        around, frame = {begin}, (f"{begin} $A", f"{begin} $A {begin} $B")
    if around:
        library.post_processor = processors.TemplateProcessing(
            single=frame[0], pair=frame[1], special_tokens=[(name, ids[name]) for name in around]
        )
    return library


@dataclass(frozen=True)
class TextTable:
    """Texts and labels of a CSV file with a header; labels are numbered in sorted order.

    Attributes:
      path: the file.
      text: the column of texts.
      label: the column of labels; None if there is none.
      pair: a column of second texts; None if there is none.
      names: of the classes, by number; None: the labels of the file, sorted.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a column is missing.
    """

    path: str | Path
    text: str = "text"
    label: str | None = "label"
    pair: str | None = None
    names: tuple[str, ...] | None = None

    @functools.cached_property
    def rows(self) -> list[dict[str, str]]:
        """The rows of the file."""
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"There is no file {str(self.path)!r} to read texts from.")
        file = CsvFile(self.path, decimal=".")
        for column in filter(None, (self.text, self.label, self.pair)):
            if file.header.count(column) != 1:
                raise ValueError(
                    f"{str(self.path)!r} has {file.header.count(column) or 'no'} column"
                    f"{'s' * (file.header.count(column) > 1)} {column!r}; its columns are "
                    f"{', '.join(file.header)}."
                )
        return [
            dict(zip(file.header, row, strict=False)) for piece in file.pieces() for _, row in piece
        ]

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels, by number."""
        if not self.label:
            return ()
        found = tuple(sorted({row[self.label] for row in self.rows}))
        if unknown := [n for n in found if self.names is not None and n not in self.names]:
            raise ValueError(
                f"{str(self.path)!r} has a label {unknown[0]!r}, which is none of the classes "
                f"{', '.join(self.names or ())}."
            )
        return found if self.names is None else self.names

    def numbered_as(self, classes: Sequence[str]) -> "TextTable":
        """The same file with the numbers of other classes, of which it may lack some."""
        return TextTable(self.path, self.text, self.label, self.pair, tuple(classes))

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all texts, as numbers."""
        if not self.label:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[row[self.label]] for row in self.rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        example: dict[str, Any] = {"text": row[self.text]}
        if self.pair:
            example["pair"] = row[self.pair]
        if self.label:
            example["label"] = self.classes.index(row[self.label])
        return example


@dataclass(frozen=True)
class Tokenize:
    """`text` (and `pair`) of an example to `tokens`, `token_types`, `mask`, padded to one length.

    Attributes:
      tokenizer: its `max_length` is the length.
    """

    tokenizer: Tokenizer

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Transform one example."""
        rest = {k: v for k, v in example.items() if k not in ("text", "pair")}
        pairs = [example["pair"]] if "pair" in example else None
        encoded = self.tokenizer([example["text"]], pairs, pad_to=self.tokenizer.max_length)
        return {**rest, **{key: value[0] for key, value in encoded.items()}}


@dataclass(frozen=True)
class MaskTokens:
    """BERT's masked language modelling: `label` is the token where one was chosen, else -100.

    Of the tokens that are text, `rate` are chosen; of those, 80 % become `mask_token`, 10 % a
    random token, and 10 % stay (Devlin et al., arXiv 1810.04805, section 3.1).

    Attributes:
      vocab_size: random tokens are drawn below it.
      mask_token: the id of `[MASK]` (103 in BERT's uncased vocabulary).
      special: ids that are never chosen, such as those of `[CLS]` and `[SEP]`.
      rate: share of tokens to choose; at least one is.
    """

    vocab_size: int
    mask_token: int = 103
    special: tuple[int, ...] = (0, 101, 102)
    rate: float = 0.15

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Transform one example."""
        tokens = np.asarray(example["tokens"], np.int32)
        candidates = ~np.isin(tokens, self.special)
        if "mask" in example:
            candidates &= example["mask"]
        places = np.flatnonzero(candidates)
        chosen = rng.permutation(places)[: max(1, round(self.rate * len(places)))]
        labels = np.full(tokens.shape, IGNORED, np.int32)
        labels[chosen] = tokens[chosen]
        dice = rng.random(len(chosen))
        noise = rng.integers(self.vocab_size, size=len(chosen))
        new = np.where(dice < 0.8, self.mask_token, np.where(dice < 0.9, noise, tokens[chosen]))
        masked = tokens.copy()
        masked[chosen] = new
        return {**example, "tokens": masked, "label": labels}
