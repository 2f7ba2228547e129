"""What the training loop takes: the tokens of a corpus, split and checked, and batches of them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heron.data.binidx import check_ids, is_binidx, open_binidx
from heron.data.corpora import PLAIN, Reading, read_documents
from heron.data.encode import encode_document, warn_of_no_end
from heron.data.fingerprint import fingerprint
from heron.data.recalled import Recalled
from heron.data.sampling import SampleOrder, magic_prime
from heron.errors import DataError
from heron.tokenizer import Tokenizer

__all__ = ["Batches", "Corpus", "load_corpus", "load_tokens", "read_documents", "training_text"]

TEXT_VAL_FRACTION = 0.1
_BLOCK = 1 << 24  # tokens decoded at a time


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation tokens.

    Attributes:
        train: 1-D integers, in memory or memory-mapped.
        val: 1-D integers, or None without validation.
        val_bytes: UTF-8 bytes of the text that the targets ``val[1:]`` stand for, ends of documents counted as none;
            None where ids stand for no text, or their bytes cannot be told apart.
        name: for the console.
        fingerprint: 16 hex digits that change when the tokens do. Of a binidx, which may be huge, they cover the
            lengths, and the first and last MiB of each part.
        kind: "text" or "binidx", of the training tokens.
    """

    train: np.ndarray
    val: np.ndarray | None
    val_bytes: int | None
    name: str
    fingerprint: str
    kind: str


def load_corpus(
    data: str,
    tokenizer: Tokenizer,
    val_data: str | None,
    val_fraction: float | None,
    vocab_size: int,
    reading: Reading = PLAIN,
    say: Callable[[str], None] | None = None,
) -> Corpus:
    """Read `data`, keep its end for validation unless `val_data` is given, and check every id.

    Args:
        data: text (see :func:`heron.data.corpora.read_documents`), or the path of a binidx pair.
        tokenizer: encodes text; counts the bytes that a binidx stands for.
        val_data: separate validation data, text or binidx.
        val_fraction: share kept for validation: of the text by UTF-8 bytes, cut between characters (integers: between
            words), or of the tokens of a binidx. None: 0.1 for text and 0 for binidx; unused beside `val_data`.
        vocab_size: of the model.
        reading: how text becomes documents.
        say: takes lines about what was passed over, or changed by the tokenizer.

    Raises:
        ConfigError: an unknown built-in corpus.
        DataError: data that are missing, damaged, not UTF-8 or empty, an id outside the vocabulary (its position
            named), or a split that leaves one side with fewer than two tokens.
    """
    kind = "binidx" if is_binidx(data) else "text"
    if val_data is not None:
        train, _, _ = _read(data, 0.0, tokenizer, vocab_size, reading, say)
        val, val_bytes = load_tokens(val_data, tokenizer, vocab_size, reading, say)
    else:
        if val_fraction is None:
            val_fraction = TEXT_VAL_FRACTION if kind == "text" else 0.0
        train, val, val_bytes = _read(data, val_fraction, tokenizer, vocab_size, reading, say)
    if len(train) < 2:
        raise DataError(f"{data}: wanted at least 2 tokens to train on, got {len(train)}")
    if val_data is None and val_fraction == 0:
        val, val_bytes = None, None
    elif len(val) < 2:
        raise DataError(
            f"{val_data or data}: wanted at least 2 validation tokens, got {len(val)}; "
            "give more data, or val_fraction 0 to do without"
        )
    name = data if data.startswith("builtin:") else Path(data).name
    return Corpus(train, val, val_bytes, name, fingerprint(train, val), kind)


def load_tokens(
    data: str,
    tokenizer: Tokenizer,
    vocab_size: int,
    reading: Reading = PLAIN,
    say: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, int | None]:
    """All of `data` as tokens, and the UTF-8 bytes that ``tokens[1:]`` stand for (None where unknown).

    Raises:
        DataError: as :func:`load_corpus`.
    """
    _, tokens, n_bytes = _read(data, 1.0, tokenizer, vocab_size, reading, say)
    return tokens, n_bytes


def training_text(data: str, val_data: str | None, val_fraction: float | None, reading: Reading = PLAIN) -> list[str]:
    """The texts that `load_corpus` would train on: what a vocabulary may be learned from.

    Raises:
        DataError: `data` is a binidx, whose text is encoded already, or cannot be read.
    """
    if is_binidx(data):
        raise DataError(f"{data}: is encoded already; name the tokenizer that heron prepare was given")
    documents = list(read_documents(data, reading=reading))
    if val_data is None:
        fraction = TEXT_VAL_FRACTION if val_fraction is None else val_fraction
        documents, _ = _split(documents, fraction, between_words=False)
    return [text for _, text in documents]


class Batches:
    """Samples of `tokens` by their number: RWKV-LM's cubic order for a binidx that is large enough, else a permutation.

    Args:
        tokens: 1-D integers.
        ctx_len: tokens of a sample (T).
        seed: of the permutation.
        kind: "text" or "binidx", as in :class:`Corpus`.
        prime: of the cubic order, one that :func:`heron.data.sampling.check_prime` passes; None: the largest.
        recalled: what ROSA memory recalls at each of `tokens`; None: nothing is wanted of it.

    Attributes:
        order: the :class:`heron.data.sampling.SampleOrder` that was chosen.

    Raises:
        DataError: fewer than `ctx_len` + 1 tokens.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        ctx_len: int,
        seed: int,
        kind: str,
        prime: int | None = None,
        recalled: Recalled | None = None,
    ) -> None:
        self._tokens, self._recalled = np.asarray(tokens), recalled
        if prime is None and kind == "binidx":
            prime = magic_prime(len(tokens), ctx_len)
        self.order = SampleOrder(len(tokens), ctx_len, seed, prime)

    @property
    def description(self) -> str:
        """One line about the order, for the console."""
        return self.order.description

    def batch(self, first: int, count: int, every: int = 1) -> tuple[Tensor, ...]:
        """`count` samples of the run, counted from 0: `first`, and each that is `every` behind the one before.

        Returns:
            x, y: (count, T) int64; ``y[i, t]`` is the token that follows ``x[i, t]``. With a memory also what it
            recalls at x, (count, T, K, 2) int64.
        """
        ctx_len = self.order.ctx_len
        starts = self.order.starts(first, (count - 1) * every + 1)[::every]
        rows = np.empty((count, ctx_len + 1), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            row[:] = self._tokens[start : start + ctx_len + 1]
        samples = torch.from_numpy(rows)
        x, y = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        return (x, y) if self._recalled is None else (x, y, self._recalled.at(starts, ctx_len))


def _read(
    data: str,
    val_fraction: float,
    tokenizer: Tokenizer,
    vocab_size: int,
    reading: Reading,
    say: Callable[[str], None] | None,
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Training tokens, validation tokens (the last `val_fraction`) and their `val_bytes`."""
    if is_binidx(data):
        pair = open_binidx(data)
        given = [name for name in ("column", "glob", "split_at") if getattr(reading, name) is not None]
        if given:
            warnings.warn(
                f"{data}: is a binidx, encoded already: {', '.join(given)} change nothing in it", stacklevel=3
            )
        check_ids(pair, vocab_size)
        tokens = pair.tokens
        cut = len(tokens) - int(len(tokens) * val_fraction)
        return tokens[:cut], tokens[cut:], _count_bytes(data, tokens[cut + 1 :], tokenizer)
    documents = list(read_documents(data, None, reading, say))
    if len(documents) > 1 and tokenizer.eod is None:
        warn_of_no_end(tokenizer)
    head, tail = _split(documents, val_fraction, between_words=not tokenizer.is_text)
    normalized: list[str] = []
    train, val = (_encode(part, tokenizer, vocab_size, reading.allow_normalized, normalized) for part in (head, tail))
    if normalized and say is not None:
        say(f"{data}: {len(normalized):,} of {len(head) + len(tail):,} texts as the tokenizer normalizes them")
    if not tokenizer.is_text:
        return train, val, None
    return train, val, sum(len(text.encode()) for _, text in tail) - len(tokenizer.decode_bytes(val[:1]))


def _split(
    documents: list[tuple[str, str]], val_fraction: float, between_words: bool
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Take the last `val_fraction` of the UTF-8 bytes off `documents`; the one where that begins becomes two.

    The cut moves forward to the next character, or the next space when it must fall `between_words`.
    """
    wanted = int(sum(len(text.encode()) for _, text in documents) * val_fraction)
    head, tail = list(documents), []
    while wanted > 0:
        where, text = head.pop()
        data = text.encode()
        at = max(len(data) - wanted, 0)
        wanted -= len(data)
        if at > 0:
            while at < len(data) and (not data[at : at + 1].isspace() if between_words else data[at] & 0xC0 == 0x80):
                at += 1
            head.append((where, data[:at].decode()))
        tail.append((where, data[at:].decode()))
    return head, tail[::-1]


def _encode(
    documents: list[tuple[str, str]], tokenizer: Tokenizer, vocab_size: int, allow: bool, normalized: list[str]
) -> np.ndarray:
    """The ids of `documents`; `normalized` grows by one for each text that they give back in another form."""
    ids = [
        encode_document(tokenizer, where, text, vocab_size, allow, functools.partial(normalized.append, where))
        for where, text in documents
    ]
    return np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)


def _count_bytes(data: str, tokens: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """UTF-8 bytes of the text of `tokens`; None where they cannot be counted id by id."""
    if not (tokenizer.is_text and tokenizer.byte_level):
        return None
    try:
        blocks = range(0, len(tokens), _BLOCK)
        return sum(len(tokenizer.decode_bytes(tokens[first : first + _BLOCK])) for first in blocks)
    except DataError as error:
        raise DataError(f"{data}: was it made with another tokenizer? {error}") from None
