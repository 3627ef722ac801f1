"""A tensor inside a file that has not been read yet, and the errors of files."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

MAX_DIMENSIONS = 32  # NumPy 1's limit, far above any layer's


class CheckpointError(ValueError):
    """A checkpoint file that is broken, truncated or of an unknown format; it says why."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint file that asks for what no published weights need; nothing of it was run."""


@dataclass(frozen=True)
class Tensor:
    """Shape and type of a tensor in a file, and how to read it.

    Attributes:
      shape: its shape.
      dtype: its NumPy type (`ml_dtypes` for bfloat16 and float8), in the machine's byte order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _read: Callable[[], np.ndarray] = field(repr=False)

    def read(self) -> np.ndarray:
        """Its values: a fresh array each time, the only memory that a tensor takes.

        Raises:
          CheckpointError: if the file changed, or its contents do not match their checksum.
        """
        return self._read()


class StateDict(dict[str, Tensor]):
    """A file's tensors by name.

    Attributes:
      notes: sentences on what was chosen in the file.
      chosen: whether it was one of several sets of weights.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], notes: tuple[str, ...] = (), chosen: bool = False
    ) -> None:
        super().__init__(tensors)
        self.notes, self.chosen = notes, chosen


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """Bytes of a file as uint8, read (not mapped, so that pages do not stay resident).

    Raises:
      CheckpointError: if the file ends before.
    """
    out = aligned_empty((count,), np.dtype(np.uint8))
    view, done = out.data, 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < count:
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{path}: the file ends {count - done} bytes early.")
            done += got
    return out


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which JAX on CPU takes without a copy."""
    count = element_count(shape) * dtype.itemsize
    room = np.empty(count + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + count].view(dtype).reshape(shape)


def file_size(path: Path) -> int:
    """Bytes in a file."""
    return os.stat(path).st_size


def as_array(raw: np.ndarray, dtype: np.dtype, big_endian: bool = False) -> np.ndarray:
    """Raw bytes as a flat array of `dtype`."""
    if dtype == np.bool_:
        return raw != 0  # any other byte than 0 or 1 would be an invalid bool
    array = raw.view(dtype)
    return array.byteswap() if big_endian and dtype.itemsize > 1 else array


def native(dtype: np.dtype) -> np.dtype:
    """The type in the machine's byte order (little-endian wherever JAX runs)."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def element_count(shape: tuple[int, ...]) -> int:
    """Number of elements, exact for any shape."""
    count = 1
    for size in shape:
        count *= size
    return count


DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "bool": np.bool_,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "int8": np.int8,
        "int16": np.int16,
        "int32": np.int32,
        "int64": np.int64,
        "float16": np.float16,
        "float32": np.float32,
        "float64": np.float64,
        "bfloat16": ml_dtypes.bfloat16,
        "complex64": np.complex64,
        "complex128": np.complex128,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
"""Types of published tensors, by the name that torch and NumPy share."""
