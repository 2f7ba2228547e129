"""The documents of a source: text, rows of JSON, tables, folders of them, and the text that every Python carries."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
import sysconfig
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from heron.data import jsonl, tables
from heron.data.files import BOM, PACKED, is_packed, opened, suffix_of
from heron.data.folders import ROW_SUFFIXES, files_in
from heron.errors import ConfigError, DataError, did_you_mean

BUILTIN = ("builtin:python-docs", "builtin:python-stdlib")
END_MARK = "<|endoftext|>"  # how the end of a document is written out in text files, TinyStories' for one
_PIECE = 1 << 20  # bytes of a text read at a time
_ROWS = (".jsonl", ".ndjson", *ROW_SUFFIXES)
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


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a source becomes documents, and these become ids. Each field is a setting of TrainConfig, which documents it.

    Raises:
        ConfigError: an empty text for one of them.
    """

    column: str | None = None
    glob: str | None = None
    split_at: str | None = None
    allow_normalized: bool = False

    def __post_init__(self) -> None:
        for name in ("column", "glob", "split_at"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name}: wanted at least one character, got an empty text; drop it to do without")

    @classmethod
    def of(cls, settings: object) -> Reading:
        """The fields of this name that `settings` has, a TrainConfig for instance."""
        return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)})

    @property
    def field(self) -> str:
        """The column of a table, or field of a JSON row, that is the text."""
        return self.column or "text"

    @property
    def mark(self) -> str | None:
        """`split_at`, in which \\n, \\r and \\t, two characters each, are those signs, as a shell hands them on."""
        signs = {"n": "\n", "r": "\r", "t": "\t"}
        return self.split_at and re.sub(r"\\([nrt])", lambda found: signs[found[1]], self.split_at)


PLAIN = Reading()


def read_documents(
    source: str,
    on_bad_line: Callable[[DataError], None] | None = None,
    reading: Reading = PLAIN,
    say: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, str]]:
    """Every document of `source` as ``(where, text)``; `where` names the file, and the line or row in one of rows.

    What a file is, its content says as well as its name. gzip, bzip2 and xz are unpacked, byte order marks left out.

    * Rows of JSON, whose `reading.field` is a document each: one object a line, or an array of them (see
      :mod:`heron.data.jsonl`). A file whose name does not say so is one when its first two objects have that field.
    * A csv or tsv, by name, and a parquet: `reading.field` is the column (see :mod:`heron.data.tables`).
    * Any other file is one document of UTF-8.
    * A folder: its files in the order of their paths (:func:`heron.data.folders.files_in` says which).
    * ``builtin:...``: see :func:`builtin`.

    With `reading.split_at`, each of these documents is cut wherever that text stands, which is in none of the parts; a
    newline right behind it goes with it. Parts without a character are no documents.

    Args:
        on_bad_line: is handed the refusal of each line or row that is no such object, of each text that is not UTF-8,
            and of each file of a folder that is something else; reading goes on behind it. None: the first is raised.
        say: takes a line about what was passed over in a folder, or read otherwise than its name says.

    Raises:
        ConfigError: there is no such built-in corpus; a `reading` that means nothing here.
        DataError: a missing, unreadable, or not UTF-8 file; a line that is no such object (its number and
            the byte where it begins are named), or is longer than jsonl.LONGEST_LINE; a folder without text.
    """
    say = say or (lambda line: None)
    if source.startswith("builtin:"):
        documents = ((f"{source}, document {n}", text) for n, text in enumerate(builtin(source), start=1))
    else:
        documents = _of_files(source, on_bad_line, reading, say)
    marks = 0
    if reading.mark is not None:
        for where, text in documents:
            marks += yield from _parts(where, text, reading.mark, on_bad_line)
        if not marks:
            warnings.warn(f"{source}: split_at '{reading.split_at}' stands nowhere in it", stacklevel=2)
        return
    for where, text in documents:
        if not isinstance(text, str):
            text = _decoded(where, b"".join(text), on_bad_line)
            if text is None:
                continue
            text = text.removeprefix("\ufeff")
        before, marks = marks, marks + text.count(END_MARK)
        if before < 2 <= marks:
            warnings.warn(
                f"{where}: {END_MARK} is written out in it, {marks:,} times up to here, and is read as text; "
                f"--split_at '{END_MARK}' ends a document there",
                stacklevel=2,
            )
        yield where, text


def text_files(source: str, reading: Reading = PLAIN) -> list[Path]:
    """The file `source`, or the data files below the folder `source`; DataError when there is none."""
    return _listed(source, reading)[0]


def cut(pieces: Iterable[bytes], mark: bytes) -> Iterator[bytes]:
    """The parts between the marks in what `pieces` join to; a newline right behind a mark goes with it.

    A newline in the mark is either of LF and CR LF in the text. A part is held in memory, and little beside it.
    """
    marks = re.compile(rb"(%s)(?:\r?\n)?" % re.escape(mark).replace(b"\\\n", rb"\r?\n"))
    longest, held, searched = len(mark) + mark.count(b"\n"), bytearray(), 0
    for piece in itertools.chain(pieces, [None]):
        held += piece or b""
        while (found := marks.search(held, searched)) is not None:
            searched = found.start()
            if piece is not None and len(held) < found.end(1) + 2:
                break  # whether a newline follows is not known yet
            yield bytes(held[:searched])
            del held[: found.end()]
            searched = 0
        else:
            searched = max(0, len(held) - longest + 1)
    yield bytes(held)


def _parts(
    where: str, text: str | Iterator[bytes], mark: str, on_bad: Callable[[DataError], None] | None
) -> Generator[tuple[str, str], None, int]:
    """The parts of a document that hold a character; returns the number of marks."""
    pieces = iter([text.encode("utf-8")] if isinstance(text, str) else text)
    head = next(pieces, b"").removeprefix(BOM)
    number = 0
    for number, part in enumerate(cut(itertools.chain([head], pieces), mark.encode("utf-8")), start=1):
        if part:
            place = where if number == 1 else f"{where}, part {number}"
            decoded = _decoded(place, part, on_bad)
            if decoded is not None:
                yield place, decoded
    return number - 1


def _of_files(
    source: str, on_bad_line: Callable[[DataError], None] | None, reading: Reading, say: Callable[[str], None]
) -> Iterator[tuple[str, str | Iterator[bytes]]]:
    """Each document of files, as a text or, where the file is one, as its bytes; these must be taken at once."""
    files, passed = _listed(source, reading)
    if passed:
        say(f"{source}: reads {len(files):,} file{'s' if len(files) > 1 else ''}; {passed}")
    is_file = files == [Path(source)]
    if is_file and reading.glob is not None:
        warnings.warn(f"glob {reading.glob!r} chooses files of a folder; {source} is a file and is read", stacklevel=3)
    for path in files:
        try:
            rows = _rows(path, on_bad_line, reading)
        except DataError as refusal:  # UTF-16 or an archive, whatever its name says
            if is_file or on_bad_line is None:
                raise
            on_bad_line(refusal)
            continue
        if rows is not None:
            if suffix_of(path) not in _ROWS:
                kind = "parquet" if _is_parquet(path) else "JSON"
                say(f"{path}: holds rows of {kind}; the {reading.field!r} of each is read")
            yield from rows
            continue
        if is_file and reading.column is not None:
            warnings.warn(f"column {reading.column!r} is for rows, of jsonl or csv; {source} is text", stacklevel=3)
        with opened(path) as file:
            yield str(path), iter(lambda: file.read(_PIECE), b"")  # taken before the next file is opened


def _rows(
    path: Path, on_bad_line: Callable[[DataError], None] | None, reading: Reading
) -> Iterator[tuple[str, str]] | None:
    """The documents of a file that consists of rows; None for one that is text."""
    column, suffix = reading.field, suffix_of(path)
    if _is_parquet(path):
        if is_packed(path):
            raise DataError(f"{path}: is a parquet inside a packed file; unpack it first")
        return tables.read_parquet(path, column, on_bad_line)
    if suffix == ".parquet":
        raise DataError(f"{path}: is no parquet: it does not begin with PAR1")
    if suffix in (".csv", ".tsv"):
        return tables.read_csv(path, column, on_bad_line)
    if suffix in _ROWS or _holds_rows(path, column):
        return jsonl.read(path, lambda row: jsonl.text(row, column), on_bad_line, (column,))
    return None


def _is_parquet(path: Path) -> bool:
    with opened(path) as file:
        return file.peek(16).startswith(b"PAR1")


def _holds_rows(path: Path, column: str) -> bool:
    """Whether a file whose name does not say what it is begins with two rows of JSON, or consists of one."""
    with opened(path) as file:
        head = file.peek(64).removeprefix(BOM).lstrip()
    if not re.match(rb"(\[\s*)?\{\s*\"", head):
        return False
    try:
        rows = jsonl.read(path, lambda row: jsonl.text(row, column), None, (column,))
        return len(list(itertools.islice(rows, 2))) > 0
    except DataError:
        return False


def _listed(source: str, reading: Reading) -> tuple[list[Path], str]:
    if not source:
        raise DataError("wanted the path of a file or folder, got an empty text")
    root = Path(source)
    if root.is_file():
        return [root], ""
    if root.is_dir():
        return files_in(root, reading.glob, lambda path: _fault(path, reading))
    if root.exists() or source == "-":
        raise DataError(f"{source}: is a pipe or device; write it to a file first: it is read more than once")
    if any(sign in root.name for sign in "*?["):
        raise DataError(f"{source}: no such file. For files by their names give the folder, and --glob '{root.name}'")
    if Path(f"{source}.bin").is_file() and Path(f"{source}.idx").is_file():
        raise DataError(f"{source}: is a binidx pair, which is encoded already; wanted the text it was made of")
    beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
    raise DataError(f"{source}: no such file or folder.{did_you_mean(root.name, beside)}")


def _fault(path: Path, reading: Reading) -> str | None:
    """Why a file is not what its name says: packed, rows (of which the first must have the column); or None."""
    try:
        if path.suffix.lower() in PACKED and not is_packed(path):
            return f"{path}: is not packed"
        if suffix_of(path) in ROW_SUFFIXES and (rows := _rows(path, None, reading)) is not None:
            next(rows, None)
    except DataError as error:
        return str(error)
    return None


def _decoded(where: str, data: bytes, on_bad: Callable[[DataError], None] | None) -> str | None:
    """The text, or None where `on_bad` has taken the refusal; None for it: the refusal is raised."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        in_line = "" if line == 1 else f" (line {line})"
        refusal = DataError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}{in_line}: {error.reason}; "
            "convert it (iconv -f LATIN1 -t UTF-8 for Latin-1), or leave it out (heron prepare --on_bad_line skip)"
        )
    if on_bad is None:
        raise refusal
    on_bad(refusal)
    return None


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
