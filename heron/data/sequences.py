"""Sequences of ids as training data: which ids are learned, and where a sequence may be cut into samples.

This is for vocabularies of an application's own, music or DNA for instance, that no text is encoded into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from heron.data import jsonl
from heron.data.conversations import Conversations, Sample, divided
from heron.data.files import suffix_of
from heron.errors import DataError

_SUFFIXES = (".jsonl", ".ndjson", ".json")


def holds_ids(data: str, column: str = "text") -> bool:
    """Whether `data` is a file of rows that have "ids", a list, and no text under `column`. Its first row tells."""
    path = Path(data)
    if suffix_of(path) not in _SUFFIXES or not path.is_file():
        return False
    try:
        rows = jsonl.read(path, lambda row: isinstance(row.get("ids"), list) and column not in row)
        return next((found for _, found in rows), False)
    except DataError:  # whoever reads it as text says what is wrong with it
        return False


def load(
    data: str,
    vocab_size: int,
    ctx_len: int,
    val_data: str | None = None,
    val_fraction: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Conversations:
    """Read rows of ids, and keep the last of them for validation unless `val_data` is given.

    A row is ``{"ids": [...], "learned": [...], "may_cut": [...]}``. `learned` and `may_cut` hold a 0 or 1 for each id:
    whether it is learned (all are, where there is no `learned`), and whether a sample may begin with it (any may,
    where there is no `may_cut`). The ids are taken as they are; an end of a document is one of them, or is not there.

    Args:
        data: a jsonl, or a JSON array of rows; packed or not (see :mod:`heron.data.files`).
        vocab_size: every id is below it.
        ctx_len: tokens that a sample may have (and one more, which is only predicted). A longer row becomes several
            samples, as :func:`cut` says; what is learned of it stays the same.
        val_fraction: of the rows; None: 0.1.
        say: takes a line about what was read.

    Raises:
        DataError: a row that is no such object, has an id outside the vocabulary, nothing that is learned, or a stretch
            of more than `ctx_len` ids without a place to cut (file, line and field are named); data without a row.
    """
    rows = _read(data, vocab_size, ctx_len, say)
    val = None if val_data is None else _read(val_data, vocab_size, ctx_len, say)
    return divided(data, rows, val, val_fraction, "sequences")


def cut(ids: np.ndarray, learned: np.ndarray, may_cut: np.ndarray, ctx_len: int) -> Iterator[Sample]:
    """The samples that a sequence becomes, each as long as `ctx_len` and the places to cut allow.

    The id that a sample begins with is the last of the sample before it, so that each learned id is predicted once.
    Parts in which nothing is learned are left out.

    Args:
        ids: (n,) integers, n >= 2.
        learned: (n,) bool: whether an id is learned. The first id is never predicted, so that it is not learned.
        may_cut: (n,) bool: whether a sample may begin with this id, so that no event is cut in two, say.
        ctx_len: most inputs of a sample; it has one id more, which is only predicted.

    Raises:
        ValueError: more than `ctx_len` ids stand between two places to cut; the message says where.
    """
    places = np.append(np.flatnonzero(may_cut[1:-1]) + 1, len(ids) - 1)
    first = 0
    while first < len(ids) - 1:
        within = places[(places > first) & (places <= first + ctx_len)]
        if not len(within):
            after = int(places[places > first][0])
            raise ValueError(
                f"may_cut: wanted a place to cut in each {ctx_len} ids, got none behind id {first} up to id {after}; "
                f"a ctx_len of {after - first} would do"
            )
        end = int(within[-1])
        part = slice(first, end + 1)
        if learned[first + 1 : end + 1].any():
            yield Sample(ids[part], learned[part], "")
        first = end


def _read(data: str, vocab_size: int, ctx_len: int, say: Callable[[str], None] | None) -> list[list[Sample]]:
    """The samples of each row."""
    sizes: list[tuple[int, int]] = []  # of each row: ids, and how many of them are learned

    def parse(row: dict[str, Any]) -> list[Sample]:
        ids = _integers(row, "ids", vocab_size)
        if len(ids) < 2:
            raise ValueError(f"ids: wanted at least 2, got {len(ids)}")
        learned, may_cut = (_flags(row, key, len(ids)) for key in ("learned", "may_cut"))
        if not learned[1:].any():
            raise ValueError("learned: nothing of it is learned behind the first id")
        sizes.append((len(ids), int(learned[1:].sum())))
        return list(cut(ids, learned, may_cut, ctx_len))

    path = Path(data)
    if not path.is_file():
        raise DataError(f"{data}: wanted a jsonl of rows of ids, and there is no such file")
    rows = [[sample._replace(where=where) for sample in found] for where, found in jsonl.read(path, parse)]
    if not rows:
        raise DataError(f"{data}: holds no row of ids")
    if say is not None:
        samples = [sample for row in rows for sample in row]
        n_ids, n_learned = (sum(count) for count in zip(*sizes, strict=True))
        parts = "" if len(samples) == len(rows) else f"; in {len(samples):,} parts of at most {ctx_len}"
        say(f"{path.name}: {len(rows):,} sequences, {n_ids:,} ids, of which {n_learned:,} are learned{parts}")
    return rows


def _flags(row: dict[str, Any], key: str, n: int) -> np.ndarray:
    """The 0 or 1 of each of `n` ids, as bool; 1 where the row has none."""
    if row.get(key) is None:
        return np.ones(n, dtype=bool)
    flags = _integers(row, key, 2)
    if len(flags) != n:
        raise ValueError(f"{key}: wanted 0 or 1 for each of the {n} ids, got {len(flags)} values")
    return flags.astype(bool)


def _integers(row: dict[str, Any], key: str, limit: int) -> np.ndarray:
    values = row.get(key)
    if not isinstance(values, list):
        raise ValueError(f'wanted a list of integers under "{key}", got {values!r:.80}')
    for place, value in enumerate(values):
        if type(value) is not int or not 0 <= value < limit:
            raise ValueError(f"{key}: wanted integers from 0 to {limit - 1}, got {value!r:.40} at place {place}")
    return np.array(values, dtype=np.int64)
