"""The beginnings of texts whose states are kept, told apart by a hash of 128 bits."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Prefix(NamedTuple):
    """The first ids of a text."""

    start_key: str  # names what comes before them: a model, an adapter, a tuned or a saved state
    length: int
    digest: bytes  # of the ids


class Lengths:
    """How long the prefixes are that are kept, by what they start from. For one thread at a time."""

    def __init__(self) -> None:
        self._counts: dict[str, collections.Counter[int]] = {}

    def add(self, start: str, length: int) -> None:
        self._counts.setdefault(start, collections.Counter())[length] += 1

    def drop(self, start: str, length: int) -> None:
        counts = self._counts[start]
        counts[length] -= 1
        if not counts[length]:
            del counts[length]
        if not counts:
            del self._counts[start]

    def of(self, start: str, most: int) -> set[int]:
        """Those of at most `most` ids."""
        return {length for length in self._counts.get(start, ()) if length <= most}


def prefixes(ids: Sequence[int], start_key: str, lengths: Iterable[int]) -> Iterator[Prefix]:
    """The prefixes of `ids` that have these lengths, longest first."""
    found, data, digest, start = [], np.asarray(ids, dtype=np.int64), hashlib.blake2b(digest_size=16), 0
    for length in sorted(lengths):
        digest.update(data[start:length].tobytes())
        start = length
        found.append(Prefix(start_key, length, digest.copy().digest()))
    return reversed(found)
