"""Snapshots in memory, up to a number of bytes."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

import torch

from heron.generation import Snapshot

_Key = TypeVar("_Key", bound=Hashable)


class Kept(NamedTuple):
    """A snapshot that is kept between requests."""

    snapshot: Snapshot
    device: torch.device  # that it came on


class Bounded(Generic[_Key]):
    """Snapshots by key: where they are too many, the ones used longest ago go. For one thread at a time.

    Attributes:
        n_bytes: of all.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes, self.n_bytes = max_bytes, 0
        self._kept: collections.OrderedDict[_Key, Kept] = collections.OrderedDict()

    def __contains__(self, key: _Key) -> bool:
        return key in self._kept

    def newest_first(self) -> Iterator[tuple[_Key, Kept]]:
        """All of them, the one used last first."""
        return reversed(self._kept.items())

    def put(self, key: _Key, kept: Kept) -> list[tuple[_Key, Kept]]:
        """Keep one, in place of another with its key, and give those that go for it: itself where it is too large."""
        self.pop(key)
        self._kept[key] = kept
        self.n_bytes += kept.snapshot.nbytes
        gone = []
        while self.n_bytes > self._max_bytes:
            oldest = next(iter(self._kept))
            gone.append((oldest, self._kept[oldest]))
            self.pop(oldest)
        return gone

    def get(self, key: _Key) -> Kept | None:
        """The one with a key, which is then used last."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def pop(self, key: _Key) -> Kept | None:
        """The one with a key, which is kept no longer."""
        kept = self._kept.pop(key, None)
        self.n_bytes -= 0 if kept is None else kept.snapshot.nbytes
        return kept
