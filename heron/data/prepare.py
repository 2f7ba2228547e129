"""Documents to ids: one document with every check, and whole corpora to binidx in several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from heron import tokenizer as tokenizers
from heron.data.binidx import BinidxWriter, bin_path
from heron.data.corpora import read_documents, text_files
from heron.data.sampling import magic_prime
from heron.errors import ConfigError, DataError
from heron.tokenizer import Tokenizer, id_dtype

CONTEXT_LENGTHS = (512, 1024, 2048, 4096)
CHUNK_CHARACTERS = 1 << 20  # text of one job
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
    """

    out: Path
    documents: int
    empty_documents: int
    tokens: int
    text_bytes: int
    max_id: int
    magic_primes: dict[int, int | None]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token, ends of documents counted as tokens."""
        return self.text_bytes / self.tokens

    def __str__(self) -> str:
        primes = ", ".join(f"{prime or 'none'} at {ctx_len}" for ctx_len, prime in self.magic_primes.items())
        return (
            f"{self.out}: {self.tokens:,} tokens of {self.documents:,} documents ({self.empty_documents:,} empty ones "
            f"left out)\n"
            f"{self.text_bytes:,} bytes of text, {self.bytes_per_token:.3f} a token; highest id {self.max_id}\n"
            f"magic primes by ctx_len: {primes}"
        )


def encode_document(tokenizer: Tokenizer, where: str, text: str, vocab_size: int) -> np.ndarray:
    """The ids of one document, checked, its end of document appended where `tokenizer` has one.

    Returns:
        1-D integers; none at all for a document without text.

    Raises:
        DataError: naming `where`: text that cannot be encoded or is not given back by decoding, an end of document
            inside it, or an id that is not below `vocab_size`.
    """
    try:
        ids = tokenizer.encode_array(text)
        back = tokenizer.decode(ids) if tokenizer.is_text else text
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if tokenizer.eod is not None and (ids == tokenizer.eod).any():
        position = int((ids == tokenizer.eod).argmax())
        raise DataError(f"{where}: the end of document, id {tokenizer.eod}, stands inside the text (token {position})")
    if back != text:
        at = len(os.path.commonprefix([back, text]))
        raise DataError(
            f"{where}: tokenizer {tokenizer.spec} does not give the text back: from character {at} on, "
            f"wanted {text[at : at + 20]!r}, got {back[at : at + 20]!r}; use one without loss, such as world"
        )
    if tokenizer.eod is not None and len(ids):
        ids = np.append(ids, np.array(tokenizer.eod, dtype=ids.dtype))
    if ids.max(initial=0) >= vocab_size:
        position = int((ids >= vocab_size).argmax())
        raise DataError(
            f"{where}: id {ids[position]} (token {position}) is outside the vocabulary of {vocab_size}; "
            f"tokenizer {tokenizer.spec} has ids below {tokenizer.vocab_size}"
        )
    return ids


def prepare(
    inputs: list[str],
    out: str,
    tokenizer: str,
    workers: int | None = None,
    vocab_size: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> PrepareStats:
    """Write the documents of `inputs`, in order, as ``out.bin`` and ``out.idx``, the same for any number of `workers`.

    Args:
        inputs: sources that :func:`heron.data.corpora.read_documents` reads.
        out: path of the pair without suffix; nothing appears there before all is done.
        tokenizer: spec for :func:`heron.tokenizer.load`.
        workers: processes that encode; 1: this one. None: one for each CPU, but this one while there is little text.
        vocab_size: of the model, when it is not the tokenizer's; it decides between uint16 and int32.
        progress: show a bar while standard error is a terminal.
        overwrite: replace an existing pair.

    Raises:
        ConfigError: an unknown tokenizer or built-in corpus, or fewer than one worker.
        DataError: a document that cannot be used (file and line named), nothing to write, or an `out` that exists or
            cannot be written.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: wanted at least 1, got {workers}")
    if Path(out).is_dir():
        raise DataError(f"{out}: wanted the path of a pair of files, got a folder; try {Path(out, 'data')}")
    if vocab_size is None:
        vocab_size = tokenizers.load(tokenizer).vocab_size
    documents = tokens = text_bytes = empty_documents = max_id = 0
    with (
        BinidxWriter(out, id_dtype(vocab_size), overwrite) as writer,
        _progress_bar(inputs, progress and sys.stderr.isatty()) as advance,
        contextlib.closing(_encoded(inputs, tokenizer, vocab_size, workers)) as chunks,
    ):
        for chunk in chunks:
            writer.append(chunk.tokens, chunk.sizes)
            documents += len(chunk.sizes)
            tokens += len(chunk.tokens)
            text_bytes += chunk.text_bytes
            empty_documents += chunk.empty_documents
            max_id = max(max_id, int(chunk.tokens.max(initial=0)))
            advance(chunk.text_bytes)
        if not tokens:
            raise DataError(f"{', '.join(inputs)}: wanted text, got {empty_documents} empty documents")
    primes = {ctx_len: magic_prime(tokens, ctx_len) for ctx_len in CONTEXT_LENGTHS}
    return PrepareStats(bin_path(out), documents, empty_documents, tokens, text_bytes, max_id, primes)


class _Chunk(NamedTuple):
    """The ids of some documents in a row, and what they were made of."""

    tokens: np.ndarray
    sizes: list[int]
    text_bytes: int
    empty_documents: int


def _encoded(inputs: list[str], spec: str, vocab_size: int, workers: int | None) -> Iterator[_Chunk]:
    """The chunks of `inputs` in their order, encoded here or in `workers` processes, a few of them at a time."""
    chunks = _chunks(itertools.chain.from_iterable(map(read_documents, inputs)))
    head = list(itertools.islice(chunks, JOBS_WORTH_PROCESSES))
    if workers is None:
        workers = _cpus() if len(head) == JOBS_WORTH_PROCESSES else 1
    if workers == 1:
        tokenizer = tokenizers.load(spec)
        for documents in itertools.chain(head, chunks):
            yield _encode_chunk(tokenizer, vocab_size, documents)
        return
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    waiting: deque[Future[_Chunk]] = deque()
    try:
        for documents in itertools.chain(head, chunks):
            waiting.append(executor.submit(_work, spec, vocab_size, documents))
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


def _encode_chunk(tokenizer: Tokenizer, vocab_size: int, documents: list[_Document]) -> _Chunk:
    ids, text_bytes = [], 0
    for where, text in documents:
        ids.append(encode_document(tokenizer, where, text, vocab_size))
        text_bytes += len(text.encode("utf-8"))
    sizes = [len(document) for document in ids if len(document)]
    return _Chunk(np.concatenate(ids), sizes, text_bytes, len(ids) - len(sizes))


def _work(spec: str, vocab_size: int, documents: list[_Document]) -> _Chunk:
    return _encode_chunk(_worker_tokenizer(spec), vocab_size, documents)


@functools.cache
def _worker_tokenizer(spec: str) -> Tokenizer:
    """Loaded once in each worker process, which lives as long as one :func:`prepare`."""
    return tokenizers.load(spec)


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress_bar(inputs: list[str], show: bool) -> Iterator[Callable[[int], None]]:
    """A function that advances a bar on standard error by so many bytes, or does nothing unless `show`."""
    if not show:
        yield lambda text_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    builtin = any(source.startswith("builtin:") for source in inputs)
    total = None if builtin else sum(path.stat().st_size for source in inputs for path in text_files(source))
    columns = (TextColumn("encoding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text_bytes: bar.advance(task, text_bytes)
