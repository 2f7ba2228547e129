"""Whole corpora to binidx, in several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from heron import __version__
from heron import tokenizer as tokenizers
from heron.data.binidx import BinidxWriter, bin_path
from heron.data.corpora import PLAIN, Reading, read_documents, text_files
from heron.data.encode import encode_document, warn_of_no_end
from heron.data.files import is_packed
from heron.data.sampling import magic_prime
from heron.data.workers import Workers
from heron.errors import ConfigError, DataError, counted
from heron.tokenizer import JsonTokenizer, Tokenizer, id_dtype

if TYPE_CHECKING:
    from heron.data.recalled import Rules

CONTEXT_LENGTHS = (512, 1024, 2048, 4096)
CHUNK_CHARACTERS = 1 << 20  # text of one job
COMMIT_BYTES = 1 << 26  # of text, between two times that the work is forced onto the disk
MOST_SKIPPED = 100  # lines and documents, beside one in a thousand
JOBS_WORTH_PROCESSES = 16  # starting processes costs as much as encoding so many jobs

_Document = tuple[str, str]  # where it comes from, its text


@dataclasses.dataclass(frozen=True)
class PrepareStats:
    """What :func:`prepare` wrote; `str()` of it is a report.

    Attributes:
        out: the `.bin`.
        documents: documents written.
        empty_documents: documents without text (or integers), left out.
        tokens: tokens written, ends of documents included.
        text_bytes: UTF-8 bytes of the text.
        max_id: highest id.
        magic_primes: by context length, the prime of RWKV-LM's sample order, or None where the data are too small.
        skipped: jsonl lines and documents that could not be used and were left out.
        resumed_at: documents that an earlier run, which was stopped, had already read.
        normalized: documents of which the ids stand for another form than was read (`Reading.allow_normalized`).
        end: what ends each document, as a clause; empty: nothing does.
        recalled: what was written beside the pair, a line; empty: nothing was.
    """

    out: Path
    documents: int
    empty_documents: int
    tokens: int
    text_bytes: int
    max_id: int
    magic_primes: dict[int, int | None]
    skipped: int = 0
    resumed_at: int = 0
    normalized: int = 0
    end: str = ""
    recalled: str = ""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token, ends of documents counted as tokens."""
        return self.text_bytes / self.tokens

    def __str__(self) -> str:
        primes = ", ".join(f"{prime or 'none'} at {ctx_len}" for ctx_len, prime in self.magic_primes.items())
        skipped = f"{self.skipped:,} skipped: see {_skip_log(self.out)}\n" if self.skipped else ""
        normalized = f"{self.normalized:,} documents as the tokenizer normalizes them\n" if self.normalized else ""
        end = f"each document ends with {self.end}\n" if self.end else ""
        resumed = f"went on after {self.resumed_at:,} documents of a run that was stopped\n" if self.resumed_at else ""
        return (
            f"{resumed}{self.out}: {counted(self.tokens, 'tokens')} of {counted(self.documents, 'documents')} "
            f"({self.empty_documents:,} empty ones left out)\n{skipped}{normalized}{end}"
            f"{self.text_bytes:,} bytes of text, {self.bytes_per_token:.3f} a token; highest id {self.max_id}\n"
            f"magic primes by ctx_len: {primes}" + (f"\n{self.recalled}" if self.recalled else "")
        )


def prepare(
    inputs: list[str],
    out: str,
    tokenizer: str,
    workers: int | None = None,
    vocab_size: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
    on_bad_line: str = "stop",
    hashes: bool = False,
    eod: str | None = None,
    reading: Reading = PLAIN,
    say: Callable[[str], None] | None = None,
    memory: Rules | None = None,
) -> PrepareStats:
    """Write the documents of `inputs`, in order, as ``out.bin`` and ``out.idx``, the same for any number of `workers`.

    Killed or stopped by an error, it goes on at the next call with the same inputs and settings from where it last
    forced its work onto the disk, which it does for every COMMIT_BYTES of text; the files come out the same to the bit.

    Args:
        inputs: sources that :func:`heron.data.corpora.read_documents` reads.
        out: path of the pair without suffix; nothing has that name before all is done.
        tokenizer: spec for :func:`heron.tokenizer.load`.
        workers: processes that encode; 1: this one. None: one for each CPU, but this one while there is little text.
        vocab_size: of the model, when it is not the tokenizer's; it decides between uint16 and int32.
        progress: show a bar while standard error is a terminal.
        overwrite: replace an existing pair.
        on_bad_line: "stop" at the first jsonl line, or text that the tokenizer does not give back; or "skip" them:
            they are counted, and named in ``out.skipped.log``.
        hashes: keep a sha256 of each block beside the pair (see :mod:`heron.data.checks`).
        eod: of :func:`heron.tokenizer.load`.
        reading: how the sources become documents.
        say: takes lines about files that were passed over.
        memory: write what these rules recall as ``out.recalled``, too (see :mod:`heron.data.recalled`).

    Raises:
        ConfigError: an unknown tokenizer, built-in corpus or `on_bad_line`, or fewer than one worker.
        DataError: a document that cannot be used (file, line and byte named); more than MOST_SKIPPED and one in a
            thousand to be skipped; nothing to write; an `out` that exists or cannot be written.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: wanted at least 1, got {workers}")
    if on_bad_line not in ("stop", "skip"):
        raise ConfigError(f"on_bad_line: wanted stop or skip, got {on_bad_line!r}")
    if Path(out).is_dir():
        raise DataError(f"{out}: wanted the path of a pair of files, got a folder; try {Path(out, 'data')}")
    loaded = tokenizers.load(tokenizer, eod)
    if vocab_size is None:
        vocab_size = loaded.vocab_size
    work = _Work(tokenizer, None if loaded.eod is None else str(loaded.eod), vocab_size, on_bad_line == "skip", reading)
    job = _job(inputs, work, hashes, memory)
    with BinidxWriter(out, id_dtype(vocab_size), overwrite, job, hashes) as writer:
        done = _Progress(**(writer.state or {}))
        resumed_at = done.read
        if on_bad_line == "stop" and done.bad_documents:
            raise DataError(done.bad_documents[0])
        if not writer.finished:
            with _progress_bar(inputs, reading, progress and sys.stderr.isatty()) as advance:
                _encode_into(writer, done, inputs, work, loaded, workers, advance, say)
            if not done.tokens:
                empty, skipped = done.empty_documents, len(done.bad_lines) + len(done.bad_documents)
                raise DataError(f"{', '.join(inputs)}: no text is in it; empty documents: {empty}, skipped: {skipped}")
            _write_skip_log(bin_path(out), [*done.bad_lines, *done.bad_documents])
            writer.commit(dataclasses.asdict(done))
            if memory is not None:
                try:
                    _recalled().write_to(writer.recalled_part, writer.tokens, memory)
                except OSError as error:
                    raise DataError(f"{writer.recalled_part}: cannot be written: {error}") from None
    primes = {ctx_len: magic_prime(done.tokens, ctx_len) for ctx_len in CONTEXT_LENGTHS}
    return PrepareStats(
        bin_path(out), done.documents, done.empty_documents, done.tokens, done.text_bytes, done.max_id, primes,
        len(done.bad_lines) + len(done.bad_documents), resumed_at, done.normalized, _end_of(loaded),
        "" if memory is None else _recalled().describe(out),
    )  # fmt: skip


def _recalled() -> ModuleType:
    """The module that needs PyTorch, which workers do without."""
    return importlib.import_module("heron.data.recalled")


def _end_of(tokenizer: Tokenizer) -> str:
    if tokenizer.eod is None:
        return ""
    return str(tokenizer.end) if isinstance(tokenizer, JsonTokenizer) else f"id {tokenizer.eod}"


class _Work(NamedTuple):
    """What a worker needs to know: how each document is encoded."""

    spec: str
    eod: str | None
    vocab_size: int
    skip: bool
    reading: Reading


@dataclasses.dataclass
class _Progress:
    """How far a run has come; this goes onto the disk with each commit.

    Attributes:
        read: documents that have been dealt with, whatever became of them.
        bad_lines: why lines were skipped; a run that goes on reads, and skips, them again.
        bad_documents: why documents were skipped that the tokenizer does not give back.
    """

    read: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    max_id: int = 0
    normalized: int = 0
    bad_lines: list[str] = dataclasses.field(default_factory=list)
    bad_documents: list[str] = dataclasses.field(default_factory=list)

    def check_skipped(self) -> None:
        """DataError when so much is skipped that something else must be wrong."""
        skipped = len(self.bad_lines) + len(self.bad_documents)
        if skipped > MOST_SKIPPED + self.read // 1000:
            raise DataError(
                f"{skipped:,} lines or documents of the first {self.read + len(self.bad_lines):,} cannot be used, "
                f"too many to skip; the last: {[*self.bad_documents, *self.bad_lines][-1]}"
            )


def _encode_into(
    writer: BinidxWriter,
    done: _Progress,
    inputs: list[str],
    work: _Work,
    tokenizer: Tokenizer,
    workers: int | None,
    advance: Callable[[int], None],
    say: Callable[[str], None] | None,
) -> None:
    """Append every document behind the first `done.read` ones, and commit now and then."""

    def refuse(error: DataError) -> None:
        done.bad_lines.append(str(error))
        done.check_skipped()

    done.bad_lines.clear()
    committed = done.text_bytes
    advance(committed)
    sources = (read_documents(source, refuse if work.skip else None, work.reading, say) for source in inputs)
    documents = itertools.islice(itertools.chain.from_iterable(sources), done.read, None)
    has_end = tokenizer.eod is not None
    with contextlib.closing(_encoded(documents, work, tokenizer, workers)) as chunks:
        for chunk in chunks:
            writer.append(chunk.tokens, chunk.sizes)
            if not has_end and done.documents + len(chunk.sizes) > 1:
                warn_of_no_end(tokenizer)
                has_end = True  # it was said
            done.read += len(chunk.sizes) + chunk.empty_documents + len(chunk.refusals)
            done.documents += len(chunk.sizes)
            done.tokens += len(chunk.tokens)
            done.text_bytes += chunk.text_bytes
            done.empty_documents += chunk.empty_documents
            done.normalized += chunk.normalized
            done.max_id = max(done.max_id, int(chunk.tokens.max(initial=0)))
            done.bad_documents += chunk.refusals
            done.check_skipped()
            advance(chunk.text_bytes)
            if done.text_bytes - committed >= COMMIT_BYTES:
                committed = done.text_bytes
                writer.commit(dataclasses.asdict(done))


def _job(inputs: list[str], work: _Work, hashes: bool, memory: Rules | None) -> str:
    """Digest of all that decides what is written, the inputs by size and time of their files."""
    reading = dataclasses.asdict(work.reading)
    parts: list[object] = [__version__, work.spec, work.eod, work.vocab_size, reading, hashes, sys.version]
    parts += [] if memory is None else [dataclasses.astuple(memory)]
    sources = [work.spec] if Path(work.spec).is_file() else []
    for source in [*sources, *inputs]:
        parts.append(source)
        if not source.startswith("builtin:"):
            stats = [(path, path.stat()) for path in text_files(source, work.reading)]
            parts += [(str(path), status.st_size, status.st_mtime_ns) for path, status in stats]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _skip_log(out: Path) -> Path:
    return out.with_suffix(".skipped.log")


def _write_skip_log(out: Path, skipped: list[str]) -> None:
    if skipped:
        _skip_log(out).write_text("\n".join([*skipped, ""]), encoding="utf-8")
    else:
        _skip_log(out).unlink(missing_ok=True)


class _Chunk(NamedTuple):
    """The ids of some documents in a row, and what they were made of."""

    tokens: np.ndarray
    sizes: list[int]
    text_bytes: int
    empty_documents: int
    refusals: list[str]
    normalized: int


def _encoded(
    documents: Iterable[_Document], work: _Work, tokenizer: Tokenizer, workers: int | None
) -> Generator[_Chunk, None, None]:
    """`documents` in chunks and in their order, encoded here or in `workers` processes, a few of them at a time."""
    chunks = _chunks(documents)
    head = list(itertools.islice(chunks, JOBS_WORTH_PROCESSES))
    if workers is None:
        workers = _cpus() if len(head) == JOBS_WORTH_PROCESSES else 1
    if workers == 1:
        for chunk in itertools.chain(head, chunks):
            yield _encode_chunk(work, tokenizer, chunk)
        return
    executor = Workers(workers)
    waiting: deque[Future[_Chunk]] = deque()
    try:
        for chunk in itertools.chain(head, chunks):
            waiting.append(executor.submit(_encode_there, work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process died, perhaps for lack of memory; try fewer (--workers 1)") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """`documents` in lists of about CHUNK_CHARACTERS of text."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document[1])
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode_chunk(work: _Work, tokenizer: Tokenizer, documents: list[_Document]) -> _Chunk:
    """The ids of `documents`; those that cannot be encoded are left out if `work.skip`."""
    ids, refusals, text_bytes, normalized = [], [], 0, []
    for where, text in documents:
        try:
            allow, note = work.reading.allow_normalized, functools.partial(normalized.append, where)
            ids.append(encode_document(tokenizer, where, text, work.vocab_size, allow, note))
        except DataError as error:
            if not work.skip:
                raise
            refusals.append(str(error))
            continue
        text_bytes += len(text.encode("utf-8"))
    sizes = [len(document) for document in ids if len(document)]
    tokens = np.concatenate([np.empty(0, np.uint8), *ids])
    return _Chunk(tokens, sizes, text_bytes, len(ids) - len(sizes), refusals, len(normalized))


def _encode_there(work: _Work, documents: list[_Document]) -> _Chunk:
    return _encode_chunk(work, _worker_tokenizer(work.spec, work.eod), documents)


@functools.cache
def _worker_tokenizer(spec: str, eod: str | None) -> Tokenizer:
    """Loaded once in each worker process, which lives as long as one :func:`prepare`."""
    return tokenizers.load(spec, eod)


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress_bar(inputs: list[str], reading: Reading, show: bool) -> Iterator[Callable[[int], None]]:
    """A function that advances a bar on standard error by so many bytes, or does nothing unless `show`."""
    if not show:
        yield lambda text_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    files = []
    if not any(source.startswith("builtin:") for source in inputs):
        files = [path for source in inputs for path in text_files(source, reading)]
    total = None if not files or any(map(is_packed, files)) else sum(path.stat().st_size for path in files)
    columns = (TextColumn("encoding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text_bytes: bar.advance(task, text_bytes)
