"""The directory of a zip file whose members are stored as they are, as torch writes them.

Only the directory is read, and each member is located in the file; nothing is extracted or
inflated. Everything that torch never writes is refused: compression, encryption, several disks,
absolute or climbing names, doubled names, members that overlap or leave the file.

Format: PKWARE's APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 and
4.3.15 (zip64 end records), 4.3.16 (end record).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from zoo.checkpoints.tensor import CheckpointError, UnsafeCheckpoint, file_size, read_bytes

MAX_MEMBERS = 200_000
MAX_DIRECTORY = 64 << 20  # bytes of central directory

_END = struct.Struct("<IHHHHIIH")
_END64_LOCATOR = struct.Struct("<IIQI")
_END64 = struct.Struct("<IQHHIIQQQQ")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_ALL_ONES_16, _ALL_ONES_32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Member:
    """Where the header and bytes of a member lie; their CRC-32 (0: the writer computed none)."""

    header: int
    offset: int
    size: int
    crc: int


def read_directory(path: Path) -> dict[str, Member]:
    """Name -> member of a zip file.

    Raises:
      UnsafeCheckpoint: for a name, a method or a flag that torch never writes.
      CheckpointError: if the file is truncated or inconsistent.
    """
    size = file_size(path)
    count, length, start = _end_record(path, size)
    if count > MAX_MEMBERS or length > MAX_DIRECTORY:
        raise UnsafeCheckpoint(
            f"{path}: the zip directory has {count} members in {length} bytes; "
            f"the limits are {MAX_MEMBERS} and {MAX_DIRECTORY}."
        )
    if start + length > size or count * _CENTRAL.size > length:
        raise CheckpointError(f"{path}: the zip directory does not lie inside the file.")
    directory = read_bytes(path, start, length).tobytes()
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        name, header, crc, bytes_, at = _central_entry(path, directory, at)
        _check_name(path, name)
        if name in members:
            raise UnsafeCheckpoint(f"{path}: the zip file holds {name!r} twice.")
        members[name] = Member(header, _data_offset(path, name, header, start), bytes_, crc)
    _check_overlap(path, members, start)
    return members


def _end_record(path: Path, size: int) -> tuple[int, int, int]:
    """Number of members, length and start of the central directory."""
    tail_start = max(0, size - _END.size - _ALL_ONES_16)
    tail = read_bytes(path, tail_start, size - tail_start).tobytes()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise CheckpointError(
            f"{path}: the zip file has no end record; it is truncated (a download that broke off?)."
        )
    _, disk, first, here, count, length, start, _ = _END.unpack_from(tail, at)
    if disk or first or here != count:
        raise UnsafeCheckpoint(f"{path}: a zip file in several parts.")
    if count == _ALL_ONES_16 or _ALL_ONES_32 in (length, start):
        located = tail_start + at - _END64_LOCATOR.size
        if located < 0:
            raise CheckpointError(f"{path}: the zip64 locator is missing.")
        locator = read_bytes(path, located, _END64_LOCATOR.size).tobytes()
        magic, _, where, _ = _END64_LOCATOR.unpack(locator)
        if magic != 0x07064B50 or where + _END64.size > size:
            raise CheckpointError(f"{path}: the zip64 locator is broken.")
        record = _END64.unpack(read_bytes(path, where, _END64.size).tobytes())
        if record[0] != 0x06064B50 or record[4] or record[5] or record[6] != record[7]:
            raise CheckpointError(f"{path}: the zip64 end record is broken.")
        count, length, start = record[7:10]
    return count, length, start


def _central_entry(path: Path, directory: bytes, at: int) -> tuple[str, int, int, int, int]:
    """Name, offset of the local header, CRC, size, and where the next entry starts."""
    if at + _CENTRAL.size > len(directory):
        raise CheckpointError(f"{path}: the zip directory is cut off.")
    fields = _CENTRAL.unpack_from(directory, at)
    magic, _, _, flags, method, _, _, crc, packed, size, name_len, extra_len, comment_len = fields[
        :13
    ]
    disk, _, _, header = fields[13:]
    if magic != 0x02014B50:
        raise CheckpointError(f"{path}: the zip directory is broken at byte {at}.")
    name_at = at + _CENTRAL.size
    extra_at = name_at + name_len
    end = extra_at + extra_len + comment_len
    if end > len(directory):
        raise CheckpointError(f"{path}: the zip directory is cut off.")
    try:
        name = directory[name_at:extra_at].decode("utf-8")
    except UnicodeDecodeError:
        raise UnsafeCheckpoint(f"{path}: a zip member's name is not UTF-8.") from None
    if flags & 0x41:
        raise UnsafeCheckpoint(f"{path}: member {name!r} is encrypted.")
    if method != 0:
        raise UnsafeCheckpoint(
            f"{path}: member {name!r} is compressed (method {method}, {size} bytes in {packed}); "
            "torch stores members as they are."
        )
    size, packed, header = _zip64(
        path, directory[extra_at : extra_at + extra_len], size, packed, header
    )
    if size != packed or disk:
        raise UnsafeCheckpoint(f"{path}: member {name!r} has sizes {size} and {packed}.")
    return name, header, crc, size, end


def _zip64(path: Path, extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The three numbers, with those that are all ones taken from the zip64 extra field."""
    values = [size, packed, header]
    wanted = [i for i, value in enumerate(values) if value == _ALL_ONES_32]
    at = 0
    while wanted and at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if tag == 1:
            if length < 8 * len(wanted) or at + length > len(extra):
                break
            numbers = struct.unpack_from(f"<{len(wanted)}Q", extra, at)
            for i, number in zip(wanted, numbers, strict=True):
                values[i] = number
            wanted = []
        at += length
    if wanted:
        raise CheckpointError(f"{path}: a zip64 field is missing.")
    return values[0], values[1], values[2]


def _check_name(path: Path, name: str) -> None:
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ":" in parts[0] or "\0" in name or not name:
        raise UnsafeCheckpoint(f"{path}: member {name!r} has an absolute or foreign path.")
    if ".." in parts:
        raise UnsafeCheckpoint(f"{path}: member {name!r} climbs out of its folder with '..'.")


def _data_offset(path: Path, name: str, header: int, directory_start: int) -> int:
    """Where a member's bytes start: after its local header, which must name it too."""
    if header + _LOCAL.size > directory_start:
        raise CheckpointError(f"{path}: member {name!r} lies outside the file.")
    fields = _LOCAL.unpack(read_bytes(path, header, _LOCAL.size).tobytes())
    magic, _, flags, method, name_len, extra_len = (*fields[:4], *fields[9:])
    if magic != 0x04034B50 or method != 0 or flags & 0x41:
        raise UnsafeCheckpoint(f"{path}: the two headers of member {name!r} differ.")
    start = header + _LOCAL.size
    if start + name_len + extra_len > directory_start:
        raise CheckpointError(f"{path}: member {name!r} lies outside the file.")
    if read_bytes(path, start, name_len).tobytes() != name.encode():
        raise UnsafeCheckpoint(f"{path}: member {name!r} has another name in its own header.")
    return start + name_len + extra_len


def _check_overlap(path: Path, members: dict[str, Member], directory_start: int) -> None:
    end, before = 0, ""
    for name, member in sorted(members.items(), key=lambda item: item[1].header):
        if member.header < end:
            raise UnsafeCheckpoint(f"{path}: members {before!r} and {name!r} overlap.")
        end, before = member.offset + member.size, name
        if end > directory_start:
            raise CheckpointError(f"{path}: member {name!r} lies outside the file.")
