"""torch's `.pth`, `.pt` and `.bin` files, without torch: the zip format and the one before it.

Zip format (torch 1.6 and later): `<root>/data.pkl` holds the object with references to storages,
`<root>/data/<key>` their bytes, `<root>/byteorder` the order of those. Legacy format: five pickles
(magic number, version, machine, the object, the storages' keys), then each storage as its number of
elements (8 bytes) and its bytes. Mechanism from `torch/serialization.py` of PyTorch (BSD-3).

The object's pickle is read as data (`pickle_machine`); tensors stay in the file until they are
asked for, and what they claim is checked against the file before anything is allocated.
"""

import re
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.checkpoints.pickle_machine import (
    MAX_PICKLE,
    PickleMachine,
    Placeholder,
    StorageRef,
    TensorRef,
)
from zoo.checkpoints.sets import choose_set, kind_of, set_note
from zoo.checkpoints.stored_zip import read_directory
from zoo.checkpoints.tensor import (
    DTYPES,
    CheckpointError,
    StateDict,
    Tensor,
    UnsafeCheckpoint,
    as_array,
    element_count,
    file_size,
    read_bytes,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
WRAPPERS = (  # entries of training checkpoints that hold the weights
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "state",
)
_NO_WEIGHTS = re.compile(
    r".*optim.*|.*schedul.*|lr_.*|.*scaler.*|amp|.*rng.*|callbacks|loops|hyper_parameters|args"
    r"|config|.*history.*|.*meters?|sampler.*|.*_opt|opt(_.*)?|grad.*"
)
_DEEPEST = 6


class _Extent(NamedTuple):
    """Where a storage lies in the file; `crc` 0 means that there is none to check."""

    offset: int
    size: int
    crc: int


def read_torch(path: Path, weights: str | None = None) -> StateDict:
    """The state dict in a torch file, lazy; see `state_dicts_of` for where it is looked for.

    Args:
      path: the file.
      weights: which set of weights, where there are several: `raw`, `averaged`, `teacher`,
        `student`, or the name of an entry.

    Raises:
      ValueError: if there is no such set.
      UnsafeCheckpoint: if it holds anything but tensors, containers and plain values.
      CheckpointError: if it is truncated, inconsistent or no torch file.
    """
    size = file_size(path)
    start = read_bytes(path, 0, min(size, 4)).tobytes()
    if start == b"PK\x03\x04":
        return _read_zip(path, size, weights)
    if start[:1] == b"\x80":
        return _read_legacy(path, size, weights)
    raise CheckpointError(f"{path}: neither a zip file nor a pickle, so it is no torch file.")


def _read_zip(path: Path, size: int, weights: str | None) -> StateDict:
    members = read_directory(path)
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a zip file with {len(roots)} data.pkl: no torch file.")
    root = roots[0]
    stray = next((name for name in members if not name.startswith(root)), None)
    if stray is not None:
        raise UnsafeCheckpoint(f"{path}: member {stray!r} lies outside of {root!r}.")
    if root + "constants.pkl" in members:
        raise UnsafeCheckpoint(f"{path}: a TorchScript program, not a state dict.")
    pickle = members[root + "data.pkl"]
    if pickle.size > MAX_PICKLE:
        raise UnsafeCheckpoint(f"{path}: a pickle of {pickle.size} bytes; {MAX_PICKLE} are enough.")
    data = read_bytes(path, pickle.offset, pickle.size)
    _check_crc(path, data, pickle.crc)
    machine = PickleMachine(data.tobytes(), str(path))
    found = machine.run()

    order = members.get(root + "byteorder")
    text = b"little"
    if order is not None:
        text = read_bytes(path, order.offset, min(order.size, 16)).tobytes()
    if text not in (b"little", b"big"):
        raise CheckpointError(f"{path}: unknown byte order {text!r}.")
    extents = {}
    for key, storage in machine.storages.items():
        member = members.get(f"{root}data/{key}")
        if member is None:
            raise CheckpointError(f"{path}: storage {key[:50]!r} is not in the file.")
        if member.size != _bytes(storage):
            raise CheckpointError(
                f"{path}: storage {key[:50]!r} should have {_bytes(storage)} bytes, "
                f"the file holds {member.size}."
            )
        extents[key] = _Extent(member.offset, member.size, member.crc)
    return _state_dict(found, path, size, extents, text == b"big", weights)


def _read_legacy(path: Path, size: int, weights: str | None) -> StateDict:
    data = read_bytes(path, 0, min(size, MAX_PICKLE)).tobytes()
    magic = PickleMachine(data, str(path))
    if magic.run() != LEGACY_MAGIC:
        raise CheckpointError(f"{path}: a pickle, but not one that torch.save wrote.")
    version = PickleMachine(data, str(path), magic.end)
    if version.run() != LEGACY_VERSION:
        raise CheckpointError(f"{path}: an unknown version of torch's legacy format.")
    system = PickleMachine(data, str(path), version.end)
    info = system.run()
    machine = PickleMachine(data, str(path), system.end)
    found = machine.run()
    listed = PickleMachine(data, str(path), machine.end)
    keys = listed.run()
    if not isinstance(info, dict) or not isinstance(keys, list):
        raise CheckpointError(f"{path}: the legacy header is broken.")
    if not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{path}: the list of storages is broken.")
    if set(keys) != set(machine.storages):
        raise CheckpointError(f"{path}: the storages listed are not those that tensors use.")
    big_endian = info.get("little_endian") is False
    extents, at = {}, listed.end
    for key in keys:
        storage = machine.storages[key]
        count = int.from_bytes(
            read_bytes(path, at, 8).tobytes(), "big" if big_endian else "little", signed=True
        )
        nbytes = _bytes(storage)
        if count != storage.count:
            raise CheckpointError(
                f"{path}: storage {key[:50]!r} has {count} elements where {storage.count} are used."
            )
        at += 8
        if at + nbytes > size:
            raise CheckpointError(f"{path}: the file ends inside storage {key[:50]!r}.")
        extents[key] = _Extent(at, nbytes, 0)
        at += nbytes
    return _state_dict(found, path, size, extents, big_endian, weights)


def _bytes(storage: StorageRef) -> int:
    return storage.count * (DTYPES[storage.dtype].itemsize if storage.dtype else 1)


def _state_dict(
    found: Any,
    path: Path,
    size: int,
    extents: Mapping[str, _Extent],
    big_endian: bool,
    weights: str | None,
) -> StateDict:
    """The set of weights asked for, or the one that is taken without a choice."""
    sets = state_dicts_of(found, path)
    part = _part_of(sets, weights) if weights is not None and weights not in sets else {}
    sets = {weights: part} if weights is not None and part else sets
    kinds = {entry: kind_of(entry) for entry in sets}
    chosen = choose_set(kinds, weights, str(path)) if len(sets) > 1 else next(iter(sets))
    several = len(set(kinds.values())) > 1
    return StateDict(
        {name: _lazy(path, size, extents, big_endian, r) for name, r in sets[chosen].items()},
        (set_note(kinds, chosen, path.name),) if several and weights is None else (),
        len(sets) > 1 or bool(part),
    )


def _part_of(sets: Mapping[str, Mapping[str, TensorRef]], name: str) -> dict[str, TensorRef]:
    """The tensors below an entry that is no set of its own: a discriminator beside a generator."""
    prefix = f"{name}."
    return {
        tensor.removeprefix(prefix): ref
        for refs in sets.values()
        for tensor, ref in refs.items()
        if tensor.startswith(prefix)
    }


def state_dicts_of(found: Any, path: Path) -> dict[str, dict[str, TensorRef]]:
    """The sets of weights in what a file holds, by the entry that holds them ("" for the object).

    Entries that are known to hold weights (`WRAPPERS`) and those of averages, teachers and students
    are sets of their own; dictionaries below any other name make names with dots. What an optimizer
    keeps is no weight, and a few tensors beside a set (the best accuracy) are none, either.

    Raises:
      CheckpointError: if there are none.
    """
    sets: dict[str, dict[str, TensorRef]] = {}
    seen: set[int] = set()

    def walk(value: Any, entry: tuple[str, ...], prefix: str, depth: int) -> None:
        if not isinstance(value, dict) or id(value) in seen or depth > _DEEPEST:
            return
        seen.add(id(value))
        for name, item in value.items():
            if not isinstance(name, str):
                continue
            if isinstance(item, TensorRef):
                sets.setdefault("/".join(entry), {}).setdefault(prefix + name, item)
        for name, item in value.items():
            if not isinstance(name, str) or _NO_WEIGHTS.fullmatch(name.lower()):
                continue
            holds = name in WRAPPERS or kind_of(name) != "raw"
            if holds and not prefix:
                walk(item, (*entry, name), "", depth + 1)
            else:
                walk(item, entry, f"{prefix}{name}.", depth + 1)

    walk(found, (), "", 0)
    if any(entry and kind_of(entry) == "raw" for entry in sets):
        sets.pop("", None)  # the best accuracy, beside the weights
    most = max(map(len, sets.values()), default=0)
    if most:
        return {entry: refs for entry, refs in sets.items() if 4 * len(refs) >= most}
    kind = f"a {type(found).__name__}"
    if isinstance(found, dict):
        kind = f"a dict with the keys {', '.join(str(key)[:50] for key in list(found)[:5])}"
    held = [found] if isinstance(found, Placeholder) else _below(found)
    kinds = {ascii(v.kind[:200])[1:-1]: None for v in held if isinstance(v, Placeholder)}
    if kinds:
        kind = f"objects of {', '.join(list(kinds)[:3])}"
    raise CheckpointError(
        f"{path}: there is no state dict in it, only {kind}. Save model.state_dict() where it was "
        "made."
    )


def _below(found: Any) -> list[Any]:
    return list(found.values()) if isinstance(found, dict) else []


def _lazy(
    path: Path, size: int, extents: Mapping[str, _Extent], big_endian: bool, ref: TensorRef
) -> Tensor:
    dtype = DTYPES[ref.dtype]
    nbytes = element_count(ref.shape) * dtype.itemsize
    if nbytes > size:
        raise UnsafeCheckpoint(
            f"{path}: a tensor of shape {ref.shape} would take {nbytes} bytes, "
            f"more than the file's {size}."
        )
    extent = extents[ref.storage.key]
    return Tensor(ref.shape, dtype, partial(_read_view, path, extent, dtype, big_endian, ref))


def _read_view(
    path: Path, extent: _Extent, dtype: np.dtype, big_endian: bool, ref: TensorRef
) -> np.ndarray:
    """The elements of one tensor: only the part of its storage that it spans is read."""
    if not element_count(ref.shape):
        return np.empty(ref.shape, dtype)
    span = 1 + sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
    first = (ref.storage.start + ref.offset) * dtype.itemsize
    raw = read_bytes(path, extent.offset + first, span * dtype.itemsize)
    if raw.size == extent.size:
        _check_crc(path, raw, extent.crc)
    flat = as_array(raw, dtype, big_endian)
    strides = tuple(s * dtype.itemsize for s in ref.strides)
    view: np.ndarray = np.ndarray(ref.shape, dtype, flat, 0, strides)
    return view if view.flags.c_contiguous else np.array(view, order="C")


def _check_crc(path: Path, raw: np.ndarray, crc: int) -> None:
    if crc and zlib.crc32(raw.data) != crc:
        raise CheckpointError(f"{path}: the file is damaged: a checksum does not fit.")
