"""Files of arrays that are memory-mapped when they are read. A sha256 confirms their header, another one the arrays.

64 bytes, little endian: 12 bytes that name the kind of file, u32 its version, u64 where the header begins, u64 its
length, its sha256. Then the arrays, each from a multiple of 64 on, then the header, JSON, up to the end of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heron import files, strict_json
from heron.errors import DataError

_HEAD = struct.Struct("<12sIQQ32s")
_ALIGNMENT = 64
_BLOCK = 1 << 24  # bytes at a time


class Kind(NamedTuple):
    """A kind of file: the 12 bytes that it begins with, the version of its form, what it is and how to make one."""

    magic: bytes
    version: int
    name: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A file that was read.

    Attributes:
        fields: what its writer said of it.
        parts: the bytes of each array, 1-D uint8; what is written there does not reach the file.
    """

    path: Path
    kind: Kind
    fields: dict[str, Any]
    parts: dict[str, np.ndarray]
    _arrays: np.ndarray
    _sha256: str

    def verify(self) -> None:
        """Read all of the arrays; DataError when they are not what was written."""
        digest = hashlib.sha256()
        for begin in range(0, len(self._arrays), _BLOCK):
            digest.update(self._arrays[begin : begin + _BLOCK].data)
        if digest.hexdigest() != self._sha256:
            raise DataError(f"{self.path}: its arrays are not what their sha256 says: damaged; {self.kind.remedy}")


def write_to(path: Path, kind: Kind, fields: Mapping[str, Any], parts: Mapping[str, Iterable[np.ndarray]]) -> None:
    """Write a file and force it onto the disk.

    Args:
        fields: JSON values.
        parts: by name, the arrays that each part consists of, one after another.
    """
    digest, places = hashlib.sha256(), {}
    with path.open("wb") as file:
        file.write(bytes(_HEAD.size))

        def put(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        for name, arrays in parts.items():
            begin = file.tell()
            for array in arrays:
                rows = max(1, _BLOCK // max(1, array[:1].nbytes))
                for first in range(0, len(array), rows):
                    put(array[first : first + rows].tobytes())
            places[name] = [begin, file.tell()]
            put(bytes(-file.tell() % _ALIGNMENT))
        at = file.tell()
        header = json.dumps({"fields": dict(fields), "parts": places, "sha256": digest.hexdigest()}).encode()
        file.write(header)
        file.seek(0)
        file.write(_HEAD.pack(kind.magic, kind.version, at, len(header), hashlib.sha256(header).digest()))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kind: Kind) -> Mapped:
    """Map a file.

    Raises:
        DataError: it is missing, of another kind or version, cut short, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
        size = path.stat().st_size
        if not head.startswith(kind.magic):
            raise DataError(f"{path}: is no {kind.name}; {kind.remedy}")
        if size < _HEAD.size:
            raise DataError(f"{path}: cut short, to {size} bytes; {kind.remedy}")
        _, version, at, length, sha256 = _HEAD.unpack(head)
        if version != kind.version:
            raise DataError(f"{path}: wanted version {kind.version} of a {kind.name}, got {version}; {kind.remedy}")
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="c"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {kind.remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if at + length != size:
        fault = "cut short, or its head is damaged" if size < at + length else "longer than it was written"
        raise DataError(f"{path}: wanted {at + length:,} bytes, got {size:,}: {fault}; {kind.remedy}")
    header = raw[at:].tobytes()
    if hashlib.sha256(header).digest() != sha256:
        raise DataError(f"{path}: its header is not what its sha256 says: damaged; {kind.remedy}")
    try:
        known = strict_json.loads(header)
        parts = {name: raw[begin:end] for name, (begin, end) in known["parts"].items()}
        return Mapped(path, kind, known["fields"], parts, raw[_HEAD.size : at], known["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no header of a {kind.name}: {error}; {kind.remedy}") from None


def refuse_foreign(path: Path, kind: Kind) -> None:
    """Let a file be named for output only if it is not there, or is of this kind; CheckpointError otherwise."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(kind.magic)) == kind.magic:
                return
    files.refuse_foreign(path, lambda content: False)
