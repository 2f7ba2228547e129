"""Rows of JSON, one object a line or all in one array: strict UTF-8, rows of bounded length, refusals that say where.

What a row holds beside the fields that are used is of no account: it need only be JSON as Python writes it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from heron import strict_json
from heron.data.files import BOM, opened, suffix_of
from heron.errors import DataError

LONGEST_LINE = 1 << 26  # bytes, the newline left out; of an array or of objects over several lines: characters of a row
_PIECE = 1 << 20  # bytes read at a time of a line that is too long, and of an array

_NO_END = "the array has no end: cut short"
_SPACE = re.compile(r"[ \t\r\n]*")
_ARRAY_OF_ROWS = re.compile(rb"\[\s*(\{|\Z)")

T = TypeVar("T")


def read(
    path: Path,
    parse: Callable[[dict[str, Any]], T],
    on_bad_line: Callable[[DataError], None] | None = None,
    used: Collection[str] | None = None,
) -> Iterator[tuple[str, T]]:
    """What `parse` makes of every object in `path`, with the file and line (or row) where it stands.

    The file may be packed (see :mod:`heron.data.files`) and begin with a byte order mark. Its objects stand one a line,
    with blank lines between them at will; or in an array; or, in a `.json`, one after another over several lines.

    Args:
        parse: raises ValueError for an object that is not what was wanted, with the reason.
        on_bad_line: is handed the refusal of each bad line or row, and reading goes on behind it; None: the first is
            raised. Behind a fault of the array itself nothing can be read: that one is raised in any case.
        used: keys that `parse` reads; a row in which one of them comes twice is refused. None: it reads any.

    Raises:
        DataError: a file that cannot be read; a line that is no object, that `parse` refuses, or that is longer than
            LONGEST_LINE. It names the file, the line and the byte where that begins; of an array, the row.
    """
    reader = _elements if _is_sequence(path) else _objects
    for where, place, found in reader(path):
        try:
            value = _parsed(found, parse, used)
        except ValueError as error:
            refusal = DataError(f"{where}: {error}{place}")
            if on_bad_line is None:
                raise refusal from None
            on_bad_line(refusal)
            continue
        yield where, value


def text(row: dict[str, Any], key: str) -> str:
    """The text under `key`; ValueError where there is none, or one that UTF-8 cannot hold."""
    found = row.get(key)
    if not isinstance(found, str):
        if key in row:
            got, hint = f"{_kind(found)} there", ""
        else:
            names = [
                f"{name!r} ({_kind(value)})" if isinstance(value, (list, dict)) else repr(name)
                for name, value in row.items()
            ]
            got, hint = f"the keys {', '.join(names)}" if names else "no key", _hint(row)
        raise ValueError(f'wanted a string under "{key}", got {got[:200]}{hint}')
    try:
        found.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(found[error.start])
        raise ValueError(f"character {error.start} of the {key} is {half}, half a surrogate pair") from None
    return found


def _hint(row: dict[str, Any]) -> str:
    """What to type where the text lies elsewhere."""
    if any(isinstance(value, str) for value in row.values()):
        return "; --column NAME says which field is the text"
    lists = ((key, value) for key, value in row.items() if isinstance(value, list) and value)
    inner = next((key for key, value in lists if isinstance(value[0], dict)), None)
    return f"; if these are the rows, take them out: jq -c '.[\"{inner}\"][]' FILE > rows.jsonl" if inner else ""


def _kind(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, dict)) else type(value).__name__


def _parsed(found: Any, parse: Callable[[dict[str, Any]], T], used: Collection[str] | None) -> T:
    """What `parse` makes of a row, or of the bytes of one."""
    if not isinstance(found, bytes):
        return _checked(found, parse, used)
    row = strict_json.lenient(found)
    try:
        return _checked(row, parse, used)
    except ValueError as error:
        try:
            strict_json.loads(found)
        except ValueError as fault:
            besides = "" if str(fault) == str(error) else f"; besides, {fault}"
            raise ValueError(f"{error}{besides}") from None
        raise


def _checked(row: Any, parse: Callable[[dict[str, Any]], T], used: Collection[str] | None) -> T:
    if row is None:
        raise ValueError(f"wanted at most {LONGEST_LINE:,} bytes in a line, got more; is it a jsonl?")
    if not isinstance(row, dict):
        raise ValueError(f"wanted an object, got {type(row).__name__}")
    twice = strict_json.doubled(row)
    if twice := twice if used is None else twice & set(used):
        raise ValueError(f"the key {min(twice)[:80]!r} comes twice")
    return parse(row)


def _is_sequence(path: Path) -> bool:
    """Whether objects must be looked for value by value, not line by line."""
    is_json = suffix_of(path) == ".json"
    with opened(path) as file:
        head = file.peek(1).removeprefix(BOM).lstrip()
        if head.startswith(b"["):
            return is_json or _ARRAY_OF_ROWS.match(head.rstrip()) is not None
        if not (is_json and head.startswith(b"{")):
            return False
        first = next((line for _, _, line in lines(file) if line is None or line.strip()), b"")
    try:
        return first is not None and not isinstance(strict_json.lenient(first), dict)
    except ValueError:
        return True


def _objects(path: Path) -> Iterator[tuple[str, str, bytes | None]]:
    """File and line, the byte where it begins, and its bytes, of each line that is not blank; None: it is too long."""
    with opened(path) as file:
        for number, offset, line in lines(file):
            if line is not None and number > 1:
                line = line.removeprefix(BOM)  # of a file that was put behind another
            if line is None or line.strip():
                yield f"{path}, line {number}", f" (the line begins at byte {offset:,})", line


def lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, offset and bytes of each line that ends with a newline or the file; None for one beyond LONGEST_LINE.

    A byte order mark at the head of the file is left out.
    """
    number = offset = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        length = len(line)
        if length > LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(_PIECE)
                length += len(line)
            line = None
        elif number == 1:
            line = line.removeprefix(BOM)
        yield number, offset, line
        offset += length


def _elements(path: Path) -> Iterator[tuple[str, str, Any]]:
    """File and row of each value, as in :func:`_objects`, of an array or of objects one after another.

    Raises:
        DataError: where the values have no order in which to go on.
    """

    def refuse(what: object) -> NoReturn:
        raise DataError(f"{path}, row {number}: {what}; behind it nothing can be read")

    number = 1
    with opened(path) as file:
        source = _Characters(file, refuse)
        is_array = source.next() == "["
        source.at += is_array
        while (character := source.next()) or is_array:
            if is_array and number == 1 and character == "]":
                break
            if not character:
                refuse(_NO_END)
            yield f"{path}, row {number}", "", source.value()
            number += 1
            if is_array:
                character = source.next()
                if character != ",":
                    break
                source.at += 1
        if is_array:
            if character != "]":
                refuse(f"wanted , or ] in front of it, got {character!r}" if character else _NO_END)
            source.at += 1
            if source.next():
                refuse("something follows the array")


class _Characters:
    """The characters of a file, of which a bounded part is held; `at` is where reading has come to in it."""

    def __init__(self, file: BinaryIO, refuse: Callable[[object], NoReturn]) -> None:
        self._file, self._refuse = file, refuse
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._held, self._bytes, self._ended = "", 0, False
        self.at = 0
        self._more(_PIECE)
        self._held = self._held.removeprefix("\ufeff")

    def next(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self.at = _SPACE.match(self._held, self.at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.at < len(self._held) or self._ended:
                return self._held[self.at : self.at + 1]
            self._more(_PIECE)

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = strict_json.lenient_at(self._held, self.at)
                if end < len(self._held) or self._ended:  # else a number may go on
                    self.at = end
                    return value
            except ValueError as error:
                if self._ended:
                    self._refuse(error)
            length = len(self._held) - self.at
            if length > LONGEST_LINE:
                self._refuse(f"wanted at most {LONGEST_LINE:,} characters in a row, got more, or no JSON")
            self._more(max(_PIECE, length))

    def _more(self, n_bytes: int) -> None:
        data = self._file.read(n_bytes)
        self._ended = not data
        pending = len(self._decoder.getstate()[0])
        try:
            new = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            position = self._bytes - pending + error.start
            self._refuse(f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {position}: {error.reason}")
        self._bytes += len(data)
        self._held = self._held[self.at :] + new
        self.at = 0
