"""The documents of a source: text files, jsonl, folders of them, and the text that every Python install carries."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from heron import strict_json
from heron.errors import ConfigError, DataError, did_you_mean

BUILTIN = ("builtin:python-docs", "builtin:python-stdlib")
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
LONGEST_LINE = 1 << 26  # bytes of a jsonl line, its newline left out
_PIECE = 1 << 20  # bytes read at a time of a line that is too long
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def builtin(name: str) -> list[str]:
    """The documents of a built-in corpus, the same on every call; their text is that of the running Python version.

    Args:
        name: ``"builtin:python-docs"``, the help topics of `pydoc` (about 0.47 MB), or ``"builtin:python-stdlib"``, the
            sources of the standard library without its tests.

    Raises:
        ConfigError: there is no such corpus.
        DataError: this Python was installed without it.
    """
    if name not in BUILTIN:
        raise ConfigError(f"no corpus {name!r}; there are {', '.join(BUILTIN)}.{did_you_mean(name, BUILTIN)}")
    documents = _pydoc_topics() if name == "builtin:python-docs" else _library_sources()
    if not documents:
        raise DataError(f"{name}: this Python was installed without it; name a text file instead")
    return documents


def read_documents(source: str, on_bad_line: Callable[[DataError], None] | None = None) -> Iterator[tuple[str, str]]:
    """Every document of `source` as ``(where, text)``; `where` names the file, and the line in a jsonl.

    Args:
        source: ``builtin:...``; a `.jsonl` with one object a line whose "text" is a document (blank lines are
            skipped); any other file as one document of UTF-8; or a folder, whose `.txt`, `.md` and `.jsonl` files are
            read in the order of their paths.
        on_bad_line: is handed the refusal of each jsonl line that is no such object, and reading goes on behind it;
            None: the first one is raised.

    Raises:
        ConfigError: there is no such built-in corpus.
        DataError: a missing, unreadable, or not UTF-8 file; a line that is no such object (its number and
            the byte where it begins are named), or is longer than LONGEST_LINE; a folder without text.
    """
    if source.startswith("builtin:"):
        for number, text in enumerate(builtin(source), start=1):
            yield f"{source}, document {number}", text
        return
    for path in text_files(source):
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, on_bad_line)
        else:
            yield str(path), _decoded(path, _read(path))


def text_files(source: str) -> list[Path]:
    """The file `source`, or the text files below the folder `source`; DataError when there is none."""
    root = Path(source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(f"{source}: no such file or folder.{did_you_mean(root.name, beside)}")
    files = [path for path in root.rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file()]
    if not files:
        raise DataError(f"{source}: wanted a folder with {', '.join(TEXT_SUFFIXES)} files, found none")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _read_jsonl(path: Path, on_bad_line: Callable[[DataError], None] | None) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as file:
            for number, offset, line in _lines(file):
                if line is not None and not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    text = _text_of(line)
                except ValueError as error:
                    refusal = DataError(f"{where}: {error} (the line begins at byte {offset:,})")
                    if on_bad_line is None:
                        raise refusal from None
                    on_bad_line(refusal)
                    continue
                yield where, text
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


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


def _text_of(line: bytes | None) -> str:
    """The document in one jsonl line; ValueError when there is none."""
    if line is None:
        raise ValueError(f"wanted at most {LONGEST_LINE:,} bytes in a line, got more; is it a jsonl?")
    row = strict_json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f'wanted an object {{"text": "..."}}, got {type(row).__name__}')
    text = row.get("text")
    if not isinstance(text, str):
        got = f"{type(text).__name__} there" if "text" in row else f"the keys {', '.join(map(repr, row)) or 'of none'}"
        raise ValueError(f'wanted a string under "text", got {got[:200]}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"character {error.start} of the text is {half}, half a surrogate pair") from None
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _decoded(where: str | Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        in_line = "" if line == 1 else f" (line {line})"
        raise DataError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}{in_line}: {error.reason}"
        ) from None


def _pydoc_topics() -> list[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def _library_sources() -> list[str]:
    """The .py files of the standard library in the order of their paths, without tests, generated and empty files."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(place.parts) and not path.name.startswith("_sysconfigdata"):
            try:
                sources[place.as_posix()] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few modules declare another encoding
    return [sources[place] for place in sorted(sources) if sources[place]]
