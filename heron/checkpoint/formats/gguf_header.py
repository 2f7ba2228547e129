"""The header of a GGUF file: every length in it checked against the file, and its metadata by name.

Source of the format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

_TEXT, _ARRAY = 8, 9  # kinds of values; of the others, the form in which `struct` knows them
_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

Value = int | float | bool | str | list[str]


def read(path: Path, wanted: Collection[str] = ()) -> dict[str, Value]:
    """The metadata of a file that are `wanted`, while all of its header is walked through.

    Raises:
        ValueError: it is no GGUF, or counts or measures more than it holds: a package would take its word.
    """
    with open(path, "rb") as file:
        take = _Taking(file)

        def number(n_bytes: int = 8) -> int:
            return int.from_bytes(take(n_bytes), "little")

        def text() -> str:
            return take(number()).decode("utf-8", errors="replace")

        def value(kind: int) -> Value | None:
            """The next value; None for an array of numbers, which no reader here needs."""
            if kind == _TEXT:
                return text()
            if kind != _ARRAY:
                return struct.unpack(_form(kind), take(struct.calcsize(_form(kind))))[0]
            of, length = number(4), number()
            if of == _TEXT and length <= take.left // 8:
                return [text() for _ in range(length)]
            take(length * struct.calcsize(_form(of)))
            return None

        if take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := number(4)) not in (2, 3):
            raise ValueError(f"wanted version 2 or 3, got {version}")
        n_tensors, n_fields = number(), number()
        found = {}
        for _ in range(n_fields):
            name, content = text(), value(number(4))
            if name in wanted:
                found[name] = content
        for _ in range(n_tensors):
            take(number())
            take(8 * number(4) + 12)  # the sizes, the type, the offset
        return found


class _Taking:
    """Reads on in a file, never beyond its end; `left` is the number of bytes that are left."""

    def __init__(self, file: BinaryIO):
        self._file, self.left = file, os.fstat(file.fileno()).st_size

    def __call__(self, n_bytes: int) -> bytes:
        if n_bytes > self.left:
            raise ValueError(f"its header speaks of {n_bytes:,} more bytes, {self.left:,} are left: damaged, or cut")
        self.left -= n_bytes
        return self._file.read(n_bytes)


def _form(kind: int) -> str:
    if kind not in _FORMS:
        raise ValueError(f"there is no kind {kind} of value")
    return _FORMS[kind]
