"""One JSON object a line, as bytes: strict UTF-8, a bound on the length of a line, refusals that say where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from heron import strict_json
from heron.errors import DataError

LONGEST_LINE = 1 << 26  # bytes, the newline left out
_PIECE = 1 << 20  # bytes read at a time of a line that is too long

T = TypeVar("T")


def read(
    path: Path, parse: Callable[[dict[str, Any]], T], on_bad_line: Callable[[DataError], None] | None = None
) -> Iterator[tuple[str, T]]:
    """What `parse` makes of every object in `path`, with the file and line where it stands; blank lines are skipped.

    Args:
        parse: raises ValueError for an object that is not what was wanted, with the reason.
        on_bad_line: is handed the refusal of each bad line, and reading goes on behind it; None: the first is raised.

    Raises:
        DataError: a file that cannot be read; a line that is no object, that `parse` refuses, or that is longer than
            LONGEST_LINE. It names the file, the line and the byte where that begins.
    """
    try:
        with path.open("rb") as file:
            for number, offset, line in _lines(file):
                if line is not None and not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    found = parse(_object(line))
                except ValueError as error:
                    refusal = DataError(f"{where}: {error} (the line begins at byte {offset:,})")
                    if on_bad_line is None:
                        raise refusal from None
                    on_bad_line(refusal)
                    continue
                yield where, found
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def text(row: dict[str, Any], key: str) -> str:
    """The text under `key`; ValueError where there is none, or one that UTF-8 cannot hold."""
    found = row.get(key)
    if not isinstance(found, str):
        got = f"{type(found).__name__} there" if key in row else f"the keys {', '.join(map(repr, row)) or 'of none'}"
        raise ValueError(f'wanted a string under "{key}", got {got[:200]}')
    try:
        found.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(found[error.start])
        raise ValueError(f"character {error.start} of the {key} is {half}, half a surrogate pair") from None
    return found


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, offset and bytes of each line that ends with a newline or the file; None for one beyond LONGEST_LINE."""
    number = offset = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        length = len(line)
        if length > LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(_PIECE)
                length += len(line)
            line = None
        yield number, offset, line
        offset += length


def _object(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise ValueError(f"wanted at most {LONGEST_LINE:,} bytes in a line, got more; is it a jsonl?")
    row = strict_json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"wanted an object, got {type(row).__name__}")
    return row
