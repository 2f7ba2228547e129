"""The documents of a source: text files, jsonl, folders of them, and the text that every Python install carries."""

from __future__ import annotations

import importlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from heron.errors import ConfigError, DataError, did_you_mean

BUILTIN = ("builtin:python-docs", "builtin:python-stdlib")
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
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


def read_documents(source: str) -> Iterator[tuple[str, str]]:
    """Every document of `source` as ``(where, text)``; `where` names the file, and the line in a jsonl.

    Args:
        source: ``builtin:...``; a `.jsonl` with one object a line whose "text" is a document (blank lines are
            skipped); any other file as one document of UTF-8; or a folder, whose `.txt`, `.md` and `.jsonl` files are
            read in the order of their paths.

    Raises:
        ConfigError: there is no such built-in corpus.
        DataError: a missing, unreadable, or not UTF-8 file; a line that is no such object; a folder without text.
    """
    if source.startswith("builtin:"):
        for number, text in enumerate(builtin(source), start=1):
            yield f"{source}, document {number}", text
        return
    for path in text_files(source):
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
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


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _text_of(where, line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _text_of(where: str, line: bytes) -> str:
    """The document in one jsonl line."""
    try:
        row = json.loads(_decoded(where, line))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: wanted an object {{"text": "..."}}, got {type(row).__name__}')
    text = row.get("text")
    if not isinstance(text, str):
        got = f"{type(text).__name__} there" if "text" in row else f"the keys {', '.join(map(repr, row)) or 'of none'}"
        raise DataError(f'{where}: wanted a string under "text", got {got[:200]}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(f"{where}: character {error.start} of the text is {half}, half a surrogate pair") from None
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
