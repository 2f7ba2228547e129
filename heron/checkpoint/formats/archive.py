"""The directory of an uncompressed zip archive, held to the one layout in which every reader sees the same members.

Source of the format: PKWARE, APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

MOST_MEMBERS = 5_050
_LARGEST_DIRECTORY = 1 << 22  # bytes
_END = struct.Struct("<4s4HIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_ENTRY = struct.Struct("<4s6HIII5HII")
_LOCAL = struct.Struct("<4s5HIIIHH")
_FLAGS = (0, 0x8, 0x800, 0x808)  # sizes may follow the data, names may be UTF-8; nothing is encrypted
_LARGEST_DESCRIPTOR = 24  # bytes that may follow a member's data
_IN_EXTRA = 0xFFFFFFFF


class Member(NamedTuple):
    """Where the bytes of one file in an archive stand, and the CRC-32 that was recorded of them."""

    start: int
    size: int
    crc: int


def read(file: BinaryIO, file_bytes: int) -> dict[str, Member]:
    """Members by name, in the order of the directory.

    Raises:
        ValueError: the archive is damaged or cut short; a member is compressed, encrypted, named twice or by an odd
            name, overlaps another, or its own header says something else; bytes belong to no member; there are more
            than MOST_MEMBERS.
    """
    begin, end, entries = _directory(file, file_bytes)
    if entries > MOST_MEMBERS or end - begin > _LARGEST_DIRECTORY:
        raise ValueError(f"{entries:,} members in a directory of {end - begin:,} bytes, too many for weights")
    file.seek(begin)
    directory = file.read(end - begin)
    members, borders = {}, [(begin, begin)]
    at = 0
    for _ in range(entries):
        name, header, member, at = _entry(directory, at)
        if name in members:
            raise ValueError(f"member {name!r} comes twice")
        start = _local(file, header, name)
        if not header < start <= start + member.size <= begin:
            raise ValueError(f"member {name!r} of {member.size:,} bytes reaches out of the file's {file_bytes:,}")
        members[name] = member._replace(start=start)
        borders.append((header, start + member.size))
    if at != len(directory):
        raise ValueError("its directory holds more than the members")
    last = 0
    for header, member_end in sorted(borders):
        if not 0 <= header - last <= (_LARGEST_DESCRIPTOR if last else 0):
            raise ValueError(f"members overlap, or bytes belong to none, around byte {last:,}")
        last = member_end
    return members


def _directory(file: BinaryIO, file_bytes: int) -> tuple[int, int, int]:
    """Where the directory begins and ends, and its number of entries."""
    tail = _LOCATOR.size + _END_64.size
    file.seek(max(file_bytes - _END.size - tail, 0))
    records = file.read()
    if len(records) < _END.size:
        raise ValueError("it ends too early: cut short")
    signature, disk, first_disk, here, entries, size, begin, comment = _END.unpack(records[-_END.size :])
    if signature != b"PK\5\6" or disk or first_disk or here != entries or comment:
        raise ValueError("the end of the archive is missing or odd: cut short, or something was added")
    end = file_bytes - _END.size
    if len(records) == tail + _END.size and records[_END_64.size :].startswith(b"PK\6\7"):
        end -= tail
        _, disk, place, disks = _LOCATOR.unpack(records[_END_64.size : tail])
        signature, rest, _, _, disk_2, first_disk, here, entries_64, size_64, begin_64 = _END_64.unpack(
            records[: _END_64.size]
        )
        if signature != b"PK\6\6" or place != end or rest != _END_64.size - 12 or disk or disk_2 or first_disk:
            raise ValueError("the end of the archive is odd")
        if disks > 1 or here != entries_64 or entries not in (entries_64, 0xFFFF):
            raise ValueError("the two ends of the archive differ")
        if size not in (size_64, _IN_EXTRA) or begin not in (begin_64, _IN_EXTRA):
            raise ValueError("the two ends of the archive differ")
        entries, size, begin = entries_64, size_64, begin_64
    if begin + size != end:
        raise ValueError(f"its directory should end at byte {end:,}, got {begin + size:,}: cut short, or changed")
    return begin, end, entries


def _entry(directory: bytes, at: int) -> tuple[str, int, Member, int]:
    """Name, place of the header, size and CRC of the member whose entry begins at `at`, and where the next begins."""
    if len(directory) - at < _ENTRY.size:
        raise ValueError("its directory is cut short")
    (
        signature, _, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes, comment, disk, _, _, header,
    ) = _ENTRY.unpack_from(directory, at)  # fmt: skip
    begin = at + _ENTRY.size
    name = _name(directory[begin : begin + name_bytes])
    if signature != b"PK\1\2" or comment or disk:
        raise ValueError(f"entry {name!r} of its directory is odd")
    if method != 0 or flags not in _FLAGS:
        raise ValueError(f"member {name!r} is compressed or encrypted; weights are stored as they are")
    extra = directory[begin + name_bytes : begin + name_bytes + extra_bytes]
    wide = iter(_wide_numbers(extra))
    try:
        size, packed, header = (next(wide) if n == _IN_EXTRA else n for n in (size, packed, header))
    except RuntimeError:  # next() inside a generator ran out
        raise ValueError(f"member {name!r} lacks its size") from None
    if packed != size:
        raise ValueError(f"member {name!r} would grow from {packed:,} to {size:,} bytes")
    return name, header, Member(0, size, crc), begin + name_bytes + extra_bytes


def _local(file: BinaryIO, header: int, name: str) -> int:
    """Where the data of a member begin, by the header in front of them, which must be of that member."""
    file.seek(header)
    raw = file.read(_LOCAL.size)
    if len(raw) < _LOCAL.size:
        raise ValueError(f"member {name!r} has no header")
    signature, _, flags, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack(raw)
    if signature != b"PK\3\4" or method != 0 or flags not in _FLAGS or _name(file.read(name_bytes)) != name:
        raise ValueError(f"member {name!r}: the header before its data says something else")
    return header + _LOCAL.size + name_bytes + extra_bytes


def _name(raw: bytes) -> str:
    name = raw.decode("utf-8")  # UnicodeDecodeError is a ValueError
    parts = name.split("/")
    if len(name) > 300 or not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"a member is named {name[:80]!r}")
    return name


def _wide_numbers(extra: bytes) -> tuple[int, ...]:
    """The 64-bit sizes and places in a member's extra field (header id 1)."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1 and at + 4 + size <= len(extra):
            return struct.unpack_from(f"<{size // 8}Q", extra, at + 4)
        at += 4 + size
    return ()
