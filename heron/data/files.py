"""A file as a stream of plain bytes: packed ones are unpacked, by what they hold, whatever they are called."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from heron.errors import DataError

BOM = b"\xef\xbb\xbf"  # of UTF-8
PACKED = (".gz", ".bz2", ".xz")  # suffixes behind the one that says what is inside
UNPACK_FIRST = (".zst", ".zip", ".lz4", ".7z", ".tar", ".tgz")  # what is named in full where nothing else is found

_HEAD = 512  # bytes looked at
_OPEN = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
    rb"\xfd7zXZ\0": lzma.open,
}
_REFUSED = {
    rb"\x28\xb5\x2f\xfd": ("Zstandard data", "zstd -d {}"),
    rb"\x04\x22\x4d\x18": ("LZ4 data", "lz4 -d {}"),
    rb"PK\x03\x04": ("a zip archive (docx and xlsx are such, too)", "unzip {}"),
    rb"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "7z x {}"),
    rb"%PDF-": ("a PDF", "pdftotext {}"),
    rb"ARROW1": (
        "an Arrow file",
        "python -c 'import sys, pandas; pandas.read_feather(sys.argv[1]).to_parquet(\"new.parquet\")' {}",
    ),
    rb"(?s:.{257})ustar": ("a tar archive", "tar xf {}"),
}
_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: ".jsonl" of `A.JSONL.gz`."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of `path`, unpacked: gzip (of one member or more), bzip2 and xz.

    Raises:
        DataError: a file that cannot be read, or is cut short; one that is packed in another way, is an archive, or
            is UTF-16 or UTF-32. It says what to type.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            head = file.peek(_HEAD)[:_HEAD]
            packing = _packing(head)
            if packing is not None:
                file = io.BufferedReader(stack.enter_context(packing(path, "rb")))
                head = file.peek(_HEAD)[:_HEAD]
            _refuse(path, head)
            yield file
    except EOFError:
        raise DataError(f"{path}: cut short: what is packed in it does not end; fetch it again") from None
    except _FAULTS as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def is_packed(path: Path) -> bool:
    """Whether the bytes of `path` are those of gzip, bzip2 or xz; DataError where they cannot be read."""
    try:
        with path.open("rb") as file:
            return _packing(file.peek(_HEAD)) is not None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _packing(head: bytes) -> Callable[..., Any] | None:
    return next((how for magic, how in _OPEN.items() if re.match(magic, head)), None)


def _refuse(path: Path, head: bytes) -> None:
    for magic, (what, command) in _REFUSED.items():
        if re.match(magic, head):
            raise DataError(
                f"{path}: is {what}, which is not read as text. Type: {command.format(shlex.quote(str(path)))}"
            )
    encoding = _wide(head)
    if encoding is not None:
        quoted = shlex.quote(str(path))
        utf8 = shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
        raise DataError(f"{path}: is {encoding}, wanted UTF-8. Type: iconv -f {encoding} -t UTF-8 {quoted} > {utf8}")


def _wide(head: bytes) -> str | None:
    """The encoding, if it is UTF-16 or UTF-32, with its byte order where no mark tells it; else None.

    A mark alone is not enough: a damaged line at the head of UTF-8 may begin like one. A newline of UTF-16 is two.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if marked:
        end = head.find(b"\n")
        little = head[0] == 0xFF
        beside = head[end + 1 : end + 2] if little else head[end - 1 : end]
        return "UTF-16" if end < 0 or beside in (b"\0", b"") or end % 2 == little else None
    for name, zeros in (("UTF-16LE", head[1::2]), ("UTF-16BE", head[::2])):
        others = head[::2] if name == "UTF-16LE" else head[1::2]
        if len(head) >= 8 and zeros.count(0) > 0.8 * len(zeros) and others.count(0) < 0.2 * len(others):
            return name
    return None
