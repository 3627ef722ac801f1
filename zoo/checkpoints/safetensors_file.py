"""safetensors files: a JSON header, then the bytes of all tensors.

Read and written here rather than with the `safetensors` package for what that package does with
memory: it maps the file (pages of it stay resident) and copies every tensor before it writes. The
tests hold both against the package. Format: huggingface/safetensors, README, "Format" (Apache-2.0).
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

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
    native,
    read_bytes,
)

MAX_HEADER = 16 << 20  # bytes of JSON: some hundred thousand tensors

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_CODES = {DTYPES[name]: code for code, name in _NAMES.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, lazy.

    Raises:
      UnsafeCheckpoint: if the header is larger than any real one.
      CheckpointError: if it is truncated or inconsistent: every byte of the file must belong to
        exactly one tensor, as the format demands.
    """
    size = file_size(path)
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file.")
    length = int.from_bytes(read_bytes(path, 0, 8).tobytes(), "little")
    if length > MAX_HEADER:
        raise UnsafeCheckpoint(f"{path}: a header of {length} bytes; the limit is {MAX_HEADER}.")
    if 8 + length > size:
        raise CheckpointError(f"{path}: the header of {length} bytes does not lie in the file.")
    header = parse_json(read_bytes(path, 8, length).tobytes(), path)
    start, body = 8 + length, size - 8 - length
    tensors: dict[str, Tensor] = {}
    spans = []
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, shape, first, last = _entry(path, name, entry, body)
            spans.append((first, last, name))
            read = partial(_read, path, start + first, last - first, dtype, shape)
            tensors[name] = Tensor(shape, dtype, read)
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise CheckpointError(f"{path}: bytes {end} to {first}, before {name!r}, do not fit.")
        end = last
    if end != body:
        raise CheckpointError(f"{path}: the tensors take {end} bytes, the file holds {body}.")
    return tensors


def save_safetensors(
    path: str | os.PathLike,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays (or lazy tensors) as a safetensors file, whole or not at all.

    Tensors are written one at a time into a temporary file beside `path`, which then takes its
    place; what was there before stays until that moment.

    Args:
      path: the file.
      state_dict: name -> array or `Tensor`.
      metadata: text stored in the header.

    Raises:
      ValueError: for a type that the format does not know.
      OSError: if the folder is not writable or the disk is full; nothing is left behind.
    """
    target = Path(path)
    arrays = {k: v if isinstance(v, Tensor) else np.asarray(v) for k, v in state_dict.items()}
    for name, array in arrays.items():
        if native(np.dtype(array.dtype)) not in _CODES:
            raise ValueError(f"safetensors has no type for {name!r} ({array.dtype}).")
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        dtype = native(np.dtype(arrays[name].dtype))
        shape = tuple(arrays[name].shape)
        end = at + element_count(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(target) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = arrays[name]
            array = value.read() if isinstance(value, Tensor) else value
            array = np.asarray(array, native(array.dtype), order="C")
            file.write(array.reshape(-1).view(np.uint8).data)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without doubled keys.

    Raises:
      CheckpointError: if it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name stands twice")
        return result

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON is broken: {str(error)[:200]}.") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: its JSON is no object.")
    return parsed


def _entry(
    path: Path, name: str, entry: Any, body: int
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Type, shape, first and last byte of a tensor, checked."""
    label = f"{path}: tensor {name[:100]!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{label} lacks its type, shape or place.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _NAMES:
        raise CheckpointError(f"{label} is of an unknown type, {str(code)[:20]!r}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{label} has no proper shape.")
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= body:
        raise CheckpointError(f"{label} does not lie inside the file.")
    dtype = DTYPES[_NAMES[code]]
    wanted = element_count(tuple(shape)) * dtype.itemsize
    if offsets[1] - offsets[0] != wanted:
        raise CheckpointError(
            f"{label} of shape {tuple(shape)} needs {wanted} bytes and has "
            f"{offsets[1] - offsets[0]}."
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _read(
    path: Path, offset: int, count: int, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    return as_array(read_bytes(path, offset, count), dtype).reshape(shape)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes `target` if all goes well, and disappears if not."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
