"""The binidx format (Megatron MMIDIDX, version 1) that RWKV-LM trains from: tokens in `.bin`, their layout in `.idx`.

`.idx`, little endian: 9 bytes magic, u64 version, u8 dtype code, u64 n documents, u64 m; i32[n] sizes in tokens,
i64[n] byte offsets in `.bin`, i64[m] where each document begins among the n (Megatron splits documents; m = n + 1
without that). `.bin` is every token, one document after another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from heron import files
from heron.data import checks
from heron.errors import DataError
from heron.locks import locked
from heron.tokenizer import id_dtype

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
LONGEST_DOCUMENT = 2**31 - 1
SUFFIXES = (".bin", ".idx")
_BLOCK = 1 << 20  # documents checked at a time
_TOKENS = 1 << 24  # ids looked at at a time
_WORTH_KEEPING = 1 << 26  # bytes of .bin from which on the range of its ids is kept in a file


@dataclasses.dataclass(frozen=True)
class BinIdx:
    """A checked pair of files.

    Attributes:
        prefix: their path without `.bin` and `.idx`.
        tokens: 1-D read-only memory map of every token, in one of the integer dtypes.
        sizes: (documents,) int32, tokens of each stored piece, in order.
        doc_count: documents; equal to ``len(sizes)`` unless the writer split documents into pieces.
        known: hashes and range of ids, where they were found out.
    """

    prefix: Path
    tokens: np.memmap
    sizes: np.ndarray
    doc_count: int
    known: checks.Checks


def bin_path(prefix: str | Path) -> Path:
    """The `.bin` of `prefix`, which may itself end in `.bin` or `.idx`."""
    return Path(f"{_prefix(prefix)}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The `.idx` of `prefix`, which may itself end in `.bin` or `.idx`."""
    return Path(f"{_prefix(prefix)}.idx")


def is_binidx(path: str | Path) -> bool:
    """Whether `path` means a binidx pair: it ends in `.bin` or `.idx`, or is the prefix of such files."""
    if Path(path).suffix in SUFFIXES or idx_path(path).exists():
        return True
    return bin_path(path).exists() and not Path(path).exists()


def open_binidx(prefix: str | Path, verify: bool = False) -> BinIdx:
    """Map a pair of files after checking that they fit together to the byte.

    Args:
        verify: compare hashes, where they were taken, even if the files look as they did when last compared.

    Raises:
        DataError: a file of the pair is missing, empty, foreign, cut short or too long, an offset is wrong, or a block
            is not what its hash says (see :mod:`heron.data.checks`).
    """
    idx, bin_ = pair = idx_path(prefix), bin_path(prefix)
    for path in (idx, bin_):
        if not path.is_file():
            raise DataError(f"{path}: missing; binidx is a pair of files in one folder, {idx.name} and {bin_.name}")
    try:
        dtype, n, m = _read_header(idx)
        layout = np.asarray(np.memmap(idx, dtype=np.uint8, mode="r"))
        bin_bytes = bin_.stat().st_size
    except OSError as error:
        raise DataError(f"{idx}: cannot be read: {error}") from None

    sizes_end, offsets_end = HEADER.size + 4 * n, HEADER.size + 12 * n
    sizes = layout[HEADER.size : sizes_end].view("<i4")
    _check_length(bin_, bin_bytes, _check_offsets(idx, sizes, layout[sizes_end:offsets_end].view("<i8"), dtype))
    if bin_bytes == 0:
        raise DataError(f"{bin_}: wanted at least one token, got an empty file")
    borders = layout[offsets_end:].view("<i8")
    if m < 2 or borders[0] != 0 or borders[-1] != n or (borders[1:] < borders[:-1]).any():
        raise DataError(f"{idx}: wanted document borders that rise from 0 to {n} from byte {offsets_end}, got others")
    try:
        known = checks.confirm(pair, verify)
        return BinIdx(_prefix(prefix), np.memmap(bin_, dtype=dtype, mode="r"), sizes, m - 1, known)
    except OSError as error:
        raise DataError(f"{bin_}: cannot be read: {error}") from None


def check_ids(data: BinIdx, vocab_size: int) -> None:
    """DataError, with the position, at the first id that is negative or not below `vocab_size`.

    All of a large pair is read once only: its lowest and highest id are kept beside it.
    """
    if data.known.ids is not None and data.known.ids[0] >= 0 and data.known.ids[1] < vocab_size:
        return
    lowest, highest = 0, 0
    for first in range(0, len(data.tokens), _TOKENS):
        block = data.tokens[first : first + _TOKENS]
        lowest, highest = min(lowest, int(block.min())), max(highest, int(block.max()))
        if highest >= vocab_size or lowest < 0:
            at = int(((block >= vocab_size) | (block < 0)).argmax())
            raise DataError(
                f"{data.prefix}: id {block[at]} at position {first + at} is outside the vocabulary of {vocab_size}; "
                "use the vocab_size and tokenizer that the data were made with"
            )
    if data.tokens.nbytes >= _WORTH_KEEPING or data.known.hashes is not None:
        checks.remember_ids((idx_path(data.prefix), bin_path(data.prefix)), data.known, lowest, highest)


def describe(prefix: str | Path) -> str:
    """A pair in words, its hashes compared anew; DataError as :func:`open_binidx` raises it."""
    data = open_binidx(prefix, verify=True)
    longest, width = data.sizes.max(), data.tokens.dtype
    hashes = "compared, all right" if data.known.hashes else "none; heron prepare --hashes takes them"
    return (
        f"what        {bin_path(prefix)}\n"
        f"tokens      {len(data.tokens):,} of {width.name}\n"
        f"documents   {data.doc_count:,}, the longest of {longest:,} tokens\n"
        f"hashes      {hashes}"
    )


class BinidxWriter:
    """Writes a pair of files document by document, as a context manager::

        with BinidxWriter("data/corpus", np.uint16) as writer:
            writer.append(ids)

    Both files grow beside their place with `.part` at the end of their names and are renamed when the block ends well;
    when it does not, they are removed and what was there before is untouched. A kill between the two renames of an
    overwrite leaves a pair without its `.idx`, which :func:`open_binidx` refuses, never a mixed one.

    A writer with a `job` can be killed and go on: what was there at the last :meth:`commit` is kept, also when the
    block ends badly, and the next writer of the same job finds it again with the `state` that came with it.

    Args:
        prefix: path without `.bin` and `.idx`; its folder is made when missing.
        dtype: one of the six integer dtypes of the format; :func:`heron.tokenizer.id_dtype` is the rule for new data.
        overwrite: replace an existing pair.
        job: what is written from what and how, in a form that changes whenever the files might; None: always anew.
        hashes: keep a sha256 of each block in `.checks.json`.

    Attributes:
        state: what the last commit of this job was given; None: nothing is there yet.
        finished: all was written before, and only the renames were left to do.

    Raises:
        DataError: the pair exists, the folder cannot be written, another process writes there, an id does not fit the
            dtype, a document is longer than 2**31 - 1 tokens, or no token was written.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.typing.DTypeLike,
        overwrite: bool = False,
        job: str | None = None,
        hashes: bool = False,
    ) -> None:
        self._dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self._dtype]
        if not codes:
            raise DataError(f"binidx: wanted an integer dtype ({_known_dtypes()}), got {np.dtype(dtype).name}")
        self._code = codes[0]
        self._pair = (idx_path(prefix), bin_path(prefix))
        self._checks = checks.path_for(self._pair)
        self._recalled = self._pair[0].with_suffix(".recalled")
        self._sizes_part = self._pair[0].with_suffix(".sizes.part")
        self._progress = self._pair[0].with_suffix(".progress.part")
        self._overwrite, self._job, self._hashes = overwrite, job, hashes
        self.state: dict[str, Any] | None = None
        self.finished = False

    def __enter__(self) -> BinidxWriter:
        try:
            self._pair[1].parent.mkdir(parents=True, exist_ok=True)
            progress = self._kept()
            if progress is not None:
                self.state, self.finished = progress["state"], progress["finished"]
            self._refuse_existing()
            if self.finished:
                return self
            self._bin = self._opened(_part(self._pair[1]))
            self._sizes = self._opened(self._sizes_part)
            for file, length in ((self._bin, "bin_bytes"), (self._sizes, "sizes_bytes")):
                kept = 0 if progress is None else progress[length]
                if os.fstat(file.fileno()).st_size < kept:
                    raise DataError(f"{self._progress}: {length} {kept:,} are not there; delete it to start over")
                file.truncate(kept)
                file.seek(kept)
            if progress is None:
                for path in (self._progress, *map(_part, (self._pair[0], self._checks, self._recalled))):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def append(self, tokens: np.ndarray | Sequence[int], sizes: Sequence[int] | np.ndarray | None = None) -> None:
        """Add the document `tokens` (1-D integers), or the several of `sizes` tokens each that it holds in a row."""
        tokens = np.asarray(tokens) if len(tokens) else np.empty(0, self._dtype)
        sizes = np.array([len(tokens)] if sizes is None else sizes, dtype=np.int64)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or sizes.sum() != len(tokens) or (sizes < 0).any():
            raise DataError(
                f"binidx: wanted 1-D integers whose documents' sizes add up, got {tokens.dtype} {tokens.shape} "
                f"and sizes that add up to {sizes.sum()}"
            )
        if sizes.max(initial=0) > LONGEST_DOCUMENT:
            raise DataError(f"binidx: wanted documents of at most {LONGEST_DOCUMENT} tokens, got one of {sizes.max()}")
        limits = np.iinfo(self._dtype)
        outside = (tokens < limits.min) | (tokens > limits.max)
        if outside.any():
            raise DataError(f"binidx: id {tokens[outside.argmax()]} does not fit {self._dtype.name}")
        try:
            self._bin.write(tokens.astype(self._dtype).tobytes())
            self._sizes.write(sizes.astype("<i4").tobytes())
        except OSError as error:
            raise self._unwritable(error) from None

    def commit(self, state: dict[str, Any]) -> None:
        """Force what was appended onto the disk, with `state` (JSON values): a kill after this loses none of it."""
        try:
            self._commit(state, finished=False)
        except OSError as error:
            raise self._unwritable(error) from None

    @property
    def tokens(self) -> np.ndarray:
        """All that was appended, memory-mapped."""
        self._bin.flush()
        return np.memmap(_part(self._pair[1]), dtype=self._dtype, mode="r")

    @property
    def recalled_part(self) -> Path:
        """Where what the tokens recall may be written; it gets its name, ``prefix.recalled``, with the pair."""
        return _part(self._recalled)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            if not self.finished:
                self._bin.close()
                self._sizes.close()
            if not self._progress.exists():
                for path in (*map(_part, (*self._pair, self._checks, self._recalled)), self._sizes_part):
                    path.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self.finished:
            self._write_idx()
            if self._hashes:
                checks.write_to(_part(self._checks), checks.taken((_part(self._pair[0]), _part(self._pair[1]))))
            self._refuse_existing()
            if self._job is not None:
                self._commit(self.state or {}, finished=True)
            self._bin.close()
        idx, bin_ = self._pair
        if _part(bin_).exists():  # nothing has its name yet
            idx.unlink(missing_ok=True)
            self._checks.unlink(missing_ok=True)
            self._recalled.unlink(missing_ok=True)
        for path in (bin_, self._checks, self._recalled, idx):
            if _part(path).exists():
                os.replace(_part(path), path)
        files.sync(idx.parent)
        self._sizes_part.unlink(missing_ok=True)
        self._progress.unlink(missing_ok=True)

    def _write_idx(self) -> None:
        self._sizes.flush()
        sizes = np.fromfile(self._sizes_part, dtype="<i4")
        if not sizes.any():
            raise DataError(f"{self._pair[1]}: no token was written; nothing is left there")
        ends = np.cumsum(sizes, dtype="<i8") * self._dtype.itemsize
        with _part(self._pair[0]).open("wb") as idx:
            idx.write(HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(sizes) + 1))
            idx.write(sizes.tobytes())
            idx.write((ends - sizes.astype("<i8") * self._dtype.itemsize).tobytes())
            idx.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
            _flush(idx)
        _flush(self._bin)

    def _commit(self, state: dict[str, Any], finished: bool) -> None:
        _flush(self._bin)
        _flush(self._sizes)
        self.state = state
        lengths = {"bin_bytes": self._bin.tell(), "sizes_bytes": self._sizes.tell()}
        record = {"job": self._job, "dtype": self._dtype.str, "finished": finished, **lengths, "state": state}
        temporary = self._progress.with_name(f"{self._progress.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            _flush(file)
        os.replace(temporary, self._progress)
        files.sync(self._progress.parent)

    def _kept(self) -> dict[str, Any] | None:
        """What the last commit of the same job left, or None."""
        if self._job is None or not self._progress.exists():
            return None
        try:
            record = json.loads(self._progress.read_bytes())
            same = (record["job"], record["dtype"]) == (self._job, self._dtype.str)
            _ = record["state"], record["finished"], record["bin_bytes"] + record["sizes_bytes"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._progress}: damaged: {error}; delete it to start over") from None
        if not same:
            warnings.warn(f"{self._progress}: of other inputs or settings; starting over", stacklevel=4)
            return None
        return record

    def _opened(self, path: Path) -> BinaryIO:
        """`path` for reading and writing, for this process alone."""
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
        if not (locked(file) and _is_named(file, path)):
            file.close()
            raise DataError(f"{path}: another process is writing there; wait for it, or choose another name")
        return file

    def _refuse_existing(self) -> None:
        for path in self._pair[::-1]:
            if path.exists() and not self._overwrite and not (self.finished and not _part(path).exists()):
                raise DataError(f"{path}: exists; choose another name, or allow overwriting (--overwrite)")

    def _unwritable(self, error: OSError) -> DataError:
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        why = f"{error.filename} is not a folder" if is_file else error.strerror or error
        return DataError(f"{self._pair[1]}: cannot be written: {why}")


def write(
    prefix: str | Path, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int, overwrite: bool = False
) -> None:
    """Write `documents` (each 1-D ids, its end of document included) for a model of `vocab_size` ids.

    uint16 up to 65,536 ids, else int32. DataError as in :class:`BinidxWriter`.
    """
    with BinidxWriter(prefix, id_dtype(vocab_size), overwrite) as writer:
        for document in documents:
            writer.append(document)


def _prefix(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in SUFFIXES else path


def _known_dtypes() -> str:
    return ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())


def _part(path: Path) -> Path:
    """Where a file grows before it has its name."""
    return path.with_name(f"{path.name}.part")


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has its name, which its last owner may have changed; on Windows none can meanwhile."""
    return os.name == "nt" or (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())))


def _flush(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_header(idx: Path) -> tuple[np.dtype, int, int]:
    """Dtype, n and m of an `.idx` whose length is what they make it."""
    with idx.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise DataError(f"{idx}: wanted a header of {HEADER.size} bytes, got {len(head)}: empty or cut short")
    magic, version, code, n, m = HEADER.unpack(head)
    if magic != MAGIC:
        raise DataError(f"{idx}: wanted it to begin with {MAGIC!r}, got {magic!r}: not a binidx file")
    if version != VERSION:
        raise DataError(f"{idx}: wanted version {VERSION}, got {version}")
    if code not in DTYPES:
        raise DataError(f"{idx}: wanted an integer dtype code ({_known_dtypes()}), got {code}")
    _check_length(idx, idx.stat().st_size, HEADER.size + 12 * n + 8 * m)
    return DTYPES[code], n, m


def _check_offsets(idx: Path, sizes: np.ndarray, offsets: np.ndarray, dtype: np.dtype) -> int:
    """Check that each document begins where the one before it ends, and return where the last one does, in bytes."""
    end = 0
    for first in range(0, len(sizes), _BLOCK):
        lengths = sizes[first : first + _BLOCK].astype(np.int64) * dtype.itemsize
        starts = end + np.cumsum(lengths) - lengths
        wrong = (lengths < 0) | (starts != offsets[first : first + _BLOCK])
        if wrong.any():
            i = int(wrong.argmax())
            raise DataError(
                f"{idx}: document {first + i}: wanted it at byte {starts[i]} of the .bin with 0 or more tokens, "
                f"got byte {offsets[first + i]} with {sizes[first + i]}"
            )
        end = int(starts[-1] + lengths[-1])
    return end


def _check_length(path: Path, got: int, wanted: int) -> None:
    if got != wanted:
        fault = f"{wanted - got} are missing: cut short" if got < wanted else f"{got - wanted} too many"
        raise DataError(f"{path}: wanted {wanted} bytes, got {got} ({fault})")
