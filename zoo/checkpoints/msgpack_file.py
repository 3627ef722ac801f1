"""Flax's `.msgpack` files (`flax.serialization.to_bytes`), read as data and one array at a time.

A file is a tree of maps with text keys; an array is an extension of type 1 that holds its shape,
the name of its type and its bytes. Arrays above a gigabyte are maps of chunks. Nothing else makes
an array, and nothing is built from what a file claims before it is checked against the file's size.
Format: github.com/msgpack/msgpack/blob/master/spec.md; `flax/serialization.py` (Apache-2.0).
"""

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.checkpoints.tensor import (
    DTYPES,
    MAX_DIMENSIONS,
    CheckpointError,
    Tensor,
    UnsafeCheckpoint,
    as_array,
    element_count,
    file_size,
    read_bytes,
)

MAX_ITEMS = 1_000_000
MAX_DEPTH = 64
MAX_TEXT = 1 << 20  # bytes of a text or of plain bytes that are kept
CHUNKED = "__msgpack_chunked_array__"


class _Bytes(NamedTuple):
    """Bytes that stay in the file."""

    offset: int
    size: int


def read_msgpack(path: Path) -> dict[str, Tensor]:
    """The arrays of a file, lazy; names are the maps' keys joined by `/`.

    Raises:
      UnsafeCheckpoint: for extensions that are no arrays, and sizes beyond the file's.
      CheckpointError: if it is broken, or holds no arrays.
    """
    reader = _Reader(path)
    try:
        tree = reader.value(0)
    except (struct.error, UnicodeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: the file is broken near byte {reader.at} ({type(error).__name__})."
        ) from None
    if reader.at != reader.size:
        raise CheckpointError(f"{path}: {reader.size - reader.at} bytes follow the end.")
    found: dict[str, Tensor] = {}
    _collect(tree, "", found, path)
    if not found:
        raise CheckpointError(f"{path}: there are no arrays in it.")
    return found


def _collect(value: Any, name: str, found: dict[str, Tensor], path: Path) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, dict) and value.get(CHUNKED) is True:
        found[name] = _chunked(value, name, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{name}/{key}" if name else str(key), found, path)


def _chunked(value: dict, name: str, path: Path) -> Tensor:
    shape, chunks = (_in_order(value.get(key)) for key in ("shape", "chunks"))
    sizes = all(type(n) is int and n >= 0 for n in shape) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not chunks or not all(isinstance(c, Tensor) for c in chunks):
        raise CheckpointError(f"{path}: the chunks of {name[:100]!r} are broken.")
    if sum(element_count(c.shape) for c in chunks) != element_count(tuple(shape)):
        raise CheckpointError(f"{path}: the chunks of {name[:100]!r} do not make up {shape}.")

    def read() -> np.ndarray:
        return np.concatenate([c.read().reshape(-1) for c in chunks]).reshape(shape)

    return Tensor(tuple(shape), chunks[0].dtype, read)


def _in_order(value: Any) -> list:
    if not isinstance(value, dict):
        return []
    return [value[key] for key in sorted(value, key=lambda k: (len(str(k)), str(k)))]


class _Reader:
    """Walks the values of a file; `at` is the next byte."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.at, self._items = path, file_size(path), 0, 0
        self._file = open(path, "rb")  # closed with the reader

    def __del__(self) -> None:
        self._file.close()

    def _take(self, count: int) -> bytes:
        self._file.seek(self.at)
        piece = self._file.read(count) if self.at + count <= self.size else b""
        if len(piece) < count:
            raise CheckpointError(f"{self.path}: the file ends early, at byte {self.size}.")
        self.at += count
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(f">{form}", self._take(struct.calcsize(form)))[0]

    def _skip(self, count: int) -> _Bytes:
        if self.at + count > self.size:
            raise CheckpointError(f"{self.path}: the file ends inside a value at {self.at}.")
        here = _Bytes(self.at, count)
        self.at += count
        return here

    def _text(self, count: int) -> str:
        if count > MAX_TEXT:
            raise UnsafeCheckpoint(f"{self.path}: a text of {count} bytes.")
        return self._take(count).decode()

    def _many(self, count: int, depth: int, pairs: bool) -> Any:
        self._items += count
        if self._items > MAX_ITEMS or depth > MAX_DEPTH or count > self.size:
            raise UnsafeCheckpoint(f"{self.path}: more than {MAX_ITEMS} items, or too deep a tree.")
        if not pairs:
            return [self.value(depth + 1) for _ in range(count)]
        result = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str | int):
                raise UnsafeCheckpoint(f"{self.path}: a key that is neither text nor a number.")
            result[key] = self.value(depth + 1)
        return result

    def value(self, depth: int) -> Any:
        """The value that begins at the next byte."""
        code = self._take(1)[0]
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 256
        if code <= 0x8F:
            return self._many(code & 15, depth, True)
        if code <= 0x9F:
            return self._many(code & 15, depth, False)
        if code <= 0xBF:
            return self._text(code & 31)
        if code not in _CODES:
            raise CheckpointError(f"{self.path}: an unknown code {code:#x} at {self.at - 1}.")
        return _CODES[code](self, depth)

    def array(self, size: int) -> Tensor | _Bytes:
        """An extension's array."""
        kind = self._number("b")
        if kind != 1:
            if kind not in (2, 3):  # complex numbers and NumPy's scalars
                raise UnsafeCheckpoint(f"{self.path}: an extension of type {kind}, no array.")
            return self._skip(size)
        end = self.at + size
        parts = self.value(MAX_DEPTH - 2)
        fits = isinstance(parts, list) and len(parts) == 3 and self.at == end
        shape, dtype, where = parts if fits else (None, None, None)
        if isinstance(dtype, bytes):
            dtype = dtype.decode()
        if not isinstance(shape, list) or dtype not in DTYPES or not isinstance(where, _Bytes):
            raise CheckpointError(f"{self.path}: an array near byte {end} is broken.")
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise CheckpointError(f"{self.path}: an array of shape {shape}.")
        kind_of = DTYPES[dtype]
        if element_count(tuple(shape)) * kind_of.itemsize != where.size:
            raise UnsafeCheckpoint(
                f"{self.path}: an array of shape {shape} does not have {where.size} bytes."
            )
        return Tensor(tuple(shape), kind_of, partial(_read, self.path, where, shape, kind_of))


def _read(path: Path, where: _Bytes, shape: list[int], dtype: np.dtype) -> np.ndarray:
    return as_array(read_bytes(path, where.offset, where.size), dtype).reshape(shape)


def _number(form: str) -> Callable[[_Reader, int], Any]:
    return lambda reader, depth: reader._number(form)


def _many(form: str, pairs: bool) -> Callable[[_Reader, int], Any]:
    return lambda reader, depth: reader._many(reader._number(form), depth, pairs)


def _sized(action: Callable[[_Reader, int], Any], form: str) -> Callable[[_Reader, int], Any]:
    return lambda reader, depth: action(reader, reader._number(form))


def _fixed(size: int) -> Callable[[_Reader, int], Any]:
    return lambda reader, depth: reader.array(size)


_CODES: dict[int, Callable[[_Reader, int], Any]] = {
    0xC0: lambda reader, depth: None,
    0xC2: lambda reader, depth: False,
    0xC3: lambda reader, depth: True,
    **{c: _number(form) for c, form in zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True)},
    0xDC: _many("H", False),
    0xDD: _many("I", False),
    0xDE: _many("H", True),
    0xDF: _many("I", True),
}
for _action, _codes in (
    (_Reader._skip, (0xC4, 0xC5, 0xC6)),
    (_Reader._text, (0xD9, 0xDA, 0xDB)),
    (_Reader.array, (0xC7, 0xC8, 0xC9)),
):
    _CODES |= {c: _sized(_action, form) for c, form in zip(_codes, "BHI", strict=True)}
_CODES |= {0xD4 + i: _fixed(1 << i) for i in range(5)}
