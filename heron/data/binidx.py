"""The binidx format (Megatron MMIDIDX, version 1) that RWKV-LM trains from: tokens in `.bin`, their layout in `.idx`.

`.idx`, little endian: 9 bytes magic, u64 version, u8 dtype code, u64 n documents, u64 m; i32[n] sizes in tokens,
i64[n] byte offsets in `.bin`, i64[m] where each document begins among the n (Megatron splits documents; m = n + 1
without that). `.bin` is every token, one document after another.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from heron.errors import DataError
from heron.tokenizer import id_dtype

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
LONGEST_DOCUMENT = 2**31 - 1
SUFFIXES = (".bin", ".idx")
_BLOCK = 1 << 20  # documents checked at a time


@dataclasses.dataclass(frozen=True)
class BinIdx:
    """A checked pair of files.

    Attributes:
        prefix: their path without `.bin` and `.idx`.
        tokens: 1-D read-only memory map of every token, in one of the integer dtypes.
        sizes: (documents,) int32, tokens of each stored piece, in order.
        doc_count: documents; equal to ``len(sizes)`` unless the writer split documents into pieces.
    """

    prefix: Path
    tokens: np.memmap
    sizes: np.ndarray
    doc_count: int


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


def open_binidx(prefix: str | Path) -> BinIdx:
    """Map a pair of files after checking that they fit together to the byte.

    Raises:
        DataError: a file of the pair is missing, empty, foreign, cut short or too long, or an offset is wrong.
    """
    idx, bin_ = idx_path(prefix), bin_path(prefix)
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
    return BinIdx(_prefix(prefix), np.memmap(bin_, dtype=dtype, mode="r"), sizes, m - 1)


class BinidxWriter:
    """Writes a pair of files document by document, as a context manager::

        with BinidxWriter("data/corpus", np.uint16) as writer:
            writer.append(ids)

    Both files grow under temporary names beside their place and are renamed when the block ends well; when it does
    not, they are removed and what was there before is untouched. A kill between the two renames of an overwrite
    leaves a pair without its `.idx`, which :func:`open_binidx` refuses, never a mixed one.

    Args:
        prefix: path without `.bin` and `.idx`; its folder is made when missing.
        dtype: one of the six integer dtypes of the format; :func:`heron.tokenizer.id_dtype` is the rule for new data.
        overwrite: replace an existing pair.

    Raises:
        DataError: the pair exists, the folder cannot be written, an id does not fit the dtype, a document is longer
            than 2**31 - 1 tokens, or no token was written.
    """

    def __init__(self, prefix: str | Path, dtype: np.typing.DTypeLike, overwrite: bool = False) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self._dtype]
        if not codes:
            raise DataError(f"binidx: wanted an integer dtype ({_known_dtypes()}), got {np.dtype(dtype).name}")
        self._code = codes[0]
        self._targets = (bin_path(prefix), idx_path(prefix))
        self._temporary = tuple(path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in self._targets)
        self._overwrite = overwrite
        self._sizes: list[np.ndarray] = []
        self._refuse_existing()

    def __enter__(self) -> BinidxWriter:
        try:
            self._targets[0].parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._temporary[0].open("wb")
        except OSError as error:
            raise DataError(f"{self._targets[0]}: cannot be written: {error}") from None
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
            tokens.astype(self._dtype).tofile(self._bin)
        except OSError as error:
            raise DataError(f"{self._targets[0]}: cannot be written: {error}") from None
        self._sizes.append(sizes.astype("<i4"))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise DataError(f"{self._targets[0]}: cannot be written: {error}") from None
        finally:
            self._bin.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        sizes = np.concatenate([np.empty(0, "<i4"), *self._sizes])
        if not sizes.any():
            raise DataError(f"{self._targets[0]}: no token was written; nothing is left there")
        ends = np.cumsum(sizes, dtype="<i8") * self._dtype.itemsize
        with self._temporary[1].open("wb") as idx:
            idx.write(HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(sizes) + 1))
            idx.write(sizes.tobytes())
            idx.write((ends - sizes.astype("<i8") * self._dtype.itemsize).tobytes())
            idx.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
            _flush(idx)
        _flush(self._bin)
        self._bin.close()
        self._refuse_existing()
        self._targets[1].unlink(missing_ok=True)
        for temporary, target in zip(self._temporary, self._targets, strict=True):
            os.replace(temporary, target)

    def _refuse_existing(self) -> None:
        for path in self._targets:
            if path.exists() and not self._overwrite:
                raise DataError(f"{path}: exists; choose another name, or allow overwriting (--overwrite)")


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


def _flush(file: BinaryIO) -> None:
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
