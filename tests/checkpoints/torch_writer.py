"""Writes torch's file formats by hand, good ones and bad ones, so that no torch is needed."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}


def pickled(*parts: bytes) -> bytes:
    """A whole pickle of protocol 2."""
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def symbol(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def numbers(values) -> bytes:
    return group(*(integer(v) for v in values))


def call(function: bytes, *args: bytes) -> bytes:
    return function + group(*args) + b"R"


def mapping(entries: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in entries.items()) + b"u"


def storage(kind: str, key: str, count: int, *more: bytes) -> bytes:
    place = (text("storage"), symbol("torch", kind), text(key), text("cpu"), integer(count))
    return group(*place, *more) + b"Q"


def rebuilt(reference: bytes, offset: int, shape, strides) -> bytes:
    """A tensor as `_rebuild_tensor_v2` describes it."""
    hooks = symbol("collections", "OrderedDict") + b")R"
    view = (integer(offset), numbers(shape), numbers(strides), b"\x89", hooks)
    return call(symbol("torch._utils", "_rebuild_tensor_v2"), reference, *view)


def tensor(key: str, array: np.ndarray) -> bytes:
    """A contiguous tensor that owns its storage."""
    strides = [int(np.prod(array.shape[i + 1 :], dtype=int)) for i in range(array.ndim)]
    reference = storage(STORAGES[array.dtype.name], key, array.size)
    return rebuilt(reference, 0, array.shape, strides)


def zip_file(
    path: Path,
    pickle: bytes,
    storages: Mapping[str, bytes],
    *,
    root: str = "archive",
    byteorder: str | None = "little",
    more: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A zip-format torch file."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickle)
        if byteorder is not None:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", "3\n")
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return path


def legacy_bytes(
    pickle: bytes, storages: Mapping[str, tuple[int, bytes]], keys: Sequence[str] | None = None
) -> bytes:
    """The bytes of a legacy torch file; a storage is its number of elements and its bytes.

    `keys` names the storages where they are written later.
    """
    kinds = mapping({k: integer(v) for k, v in (("short", 2), ("int", 4), ("long", 4))})
    info = mapping(
        {"protocol_version": integer(1001), "little_endian": b"\x88", "type_sizes": kinds}
    )
    file = io.BytesIO()
    file.write(pickled(integer(0x1950A86A20F9469CFC6C)) + pickled(integer(1001)) + pickled(info))
    file.write(pickle + pickled(b"](" + b"".join(text(k) for k in keys or storages) + b"e"))
    for count, data in storages.values():
        file.write(struct.pack("<q", count) + data)
    return file.getvalue()


def save(path: Path, arrays: Mapping[str, np.ndarray], *, legacy: bool = False) -> Path:
    """`torch.save(arrays, path)`."""
    entries = {name: tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())}
    data = {str(i): array.tobytes() for i, array in enumerate(arrays.values())}
    if legacy:
        counts = {str(i): array.size for i, array in enumerate(arrays.values())}
        path.write_bytes(
            legacy_bytes(pickled(mapping(entries)), {k: (counts[k], data[k]) for k in data})
        )
        return path
    return zip_file(path, pickled(mapping(entries)), data)


def zip64_file(path: Path, members: Mapping[str, bytes]) -> Path:
    """A zip file whose sizes and places all stand in zip64 fields, as in files above 4 GiB."""
    body, directory = b"", b""
    ones = 0xFFFFFFFF
    for name, data in members.items():
        encoded, crc = name.encode(), zlib.crc32(data)
        local = struct.pack("<HHQQ", 1, 16, len(data), len(data))
        central = struct.pack("<HHQQQ", 1, 24, len(data), len(data), len(body))
        directory += (
            struct.pack(
                "<IHHHHHHIIIHHHHHII",
                0x02014B50,
                45,
                45,
                0,
                0,
                0,
                0,
                crc,
                ones,
                ones,
                len(encoded),
                len(central),
                0,
                0,
                0,
                0,
                ones,
            )
            + encoded
            + central
        )
        body += (
            struct.pack(
                "<IHHHHHIIIHH",
                0x04034B50,
                45,
                0,
                0,
                0,
                0,
                crc,
                ones,
                ones,
                len(encoded),
                len(local),
            )
            + encoded
            + local
            + data
        )
    end64 = struct.pack(
        "<IQHHIIQQQQ",
        0x06064B50,
        44,
        45,
        45,
        0,
        0,
        len(members),
        len(members),
        len(directory),
        len(body),
    )
    locator = struct.pack("<IIQI", 0x07064B50, 0, len(body) + len(directory), 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, ones, ones, 0)
    path.write_bytes(body + directory + end64 + locator + end)
    return path
