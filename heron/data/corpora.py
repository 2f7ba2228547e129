"""The documents of a source: text files, jsonl, folders of them, and the text that every Python install carries."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from heron.data import jsonl
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
            the byte where it begins are named), or is longer than jsonl.LONGEST_LINE; a folder without text.
    """
    if source.startswith("builtin:"):
        for number, text in enumerate(builtin(source), start=1):
            yield f"{source}, document {number}", text
        return
    for path in text_files(source):
        if path.suffix == ".jsonl":
            yield from jsonl.read(path, lambda row: jsonl.text(row, "text"), on_bad_line)
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
