"""NumPy's `.npz` archives, as Google's JAX repositories publish their weights.

Headers are read and checked first; arrays of Python objects (which would be unpickled) and archives
that would inflate beyond reason are refused. Format: `numpy.lib.format`.
"""

import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from zoo.checkpoints.stored_zip import MAX_MEMBERS
from zoo.checkpoints.tensor import (
    DTYPES,
    MAX_DIMENSIONS,
    CheckpointError,
    Tensor,
    UnsafeCheckpoint,
    element_count,
    file_size,
    native,
)

MAX_INFLATION = 20  # uncompressed bytes for each byte of the file, beyond the first GiB

_BROKEN = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, NotImplementedError,
    RuntimeError, OverflowError, SyntaxError, MemoryError, RecursionError, OSError, TypeError,
)  # fmt: skip


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an archive, lazy; two-byte voids are bfloat16, which NumPy cannot name.

    Raises:
      UnsafeCheckpoint: for object arrays, foreign members and zip bombs.
      CheckpointError: if it is broken.
    """
    size = file_size(path)
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise UnsafeCheckpoint(f"{path}: {len(members)} members; {MAX_MEMBERS} are enough.")
            total = sum(member.file_size for member in members)
            if total > max(1 << 30, MAX_INFLATION * size):
                raise UnsafeCheckpoint(
                    f"{path}: {size} bytes would inflate to {total}, as a zip bomb does."
                )
            for member in members:
                name = member.filename.removesuffix(".npy")
                _check_member(path, member, name in tensors)
                with archive.open(member) as file:
                    shape, _, dtype = _header(path, name, file)
                    header = file.tell()
                nbytes = element_count(shape) * dtype.itemsize
                if header + nbytes != member.file_size:
                    raise CheckpointError(
                        f"{path}: {name!r} of shape {shape} needs {nbytes} bytes and has "
                        f"{member.file_size - header}."
                    )
                kept = DTYPES["bfloat16"] if dtype == np.dtype("V2") else native(dtype)
                if kept not in DTYPES.values():
                    raise CheckpointError(f"{path}: {name!r} is of type {dtype}, not of numbers.")
                read = partial(_read, path, member.filename, shape, kept)
                tensors[name] = Tensor(shape, kept, read)
    except CheckpointError:
        raise
    except _BROKEN as error:
        raise CheckpointError(f"{path}: the archive is broken: {str(error)[:200]}.") from None
    return tensors


def _check_member(path: Path, member: zipfile.ZipInfo, doubled: bool) -> None:
    name = member.filename
    if not name.endswith(".npy") or member.flag_bits & 0x41:
        raise UnsafeCheckpoint(f"{path}: member {name!r} is no plain .npy array.")
    if doubled:
        raise UnsafeCheckpoint(f"{path}: the archive holds {name!r} twice.")
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise UnsafeCheckpoint(f"{path}: member {name!r} has a path outside of the archive.")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnsafeCheckpoint(f"{path}: member {name!r} is compressed in a way NumPy never uses.")


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise CheckpointError(f"{path}: {name!r} is of an unknown .npy version {version}.")
    if dtype.hasobject:
        raise UnsafeCheckpoint(f"{path}: {name!r} holds Python objects, which would be unpickled.")
    if any(n < 0 for n in shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: {name!r} has the shape {shape}.")
    return shape, fortran, dtype


def _read(path: Path, member: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except _BROKEN as error:
        raise CheckpointError(f"{path}: {member!r} is broken: {str(error)[:200]}.") from None
    if array.shape != shape:
        raise CheckpointError(f"{path}: {member!r} has changed.")
    if array.dtype.kind == "V":
        return array.view(dtype)
    return np.asarray(array, dtype, order="C")
