"""The states behind the beginnings of prompts: on the device, then in host memory, then in files."""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from heron.generation import Snapshot
from heron.serve.bounded import Bounded, Kept
from heron.serve.prefix_files import PrefixFiles
from heron.serve.prefixes import Lengths, Prefix, prefixes

DEVICE, HOST, DISK = "device", "host", "disk"


class Level(NamedTuple):
    """What a level of the cache has done and holds."""

    hits: int
    n_bytes: int


class PrefixCache:
    """The states behind the beginnings of prompts. A prompt that begins like one before is read from there on.

    A state moves from the device that it came on to host memory, then to a file, as room is wanted for others that
    were used later. Any thread may call; :meth:`fetch` and :meth:`close` alone wait for a disk.

    Args:
        max_bytes: of the states on the device.
        host_bytes: of those in host memory.
        files: where those go that find no room there; None: they are forgotten.
    """

    def __init__(self, max_bytes: int, host_bytes: int, files: PrefixFiles | None = None):
        self._near: Bounded[Prefix] = Bounded(max_bytes)
        self._far: Bounded[Prefix] = Bounded(host_bytes)
        self._files = files
        self._lengths = Lengths()  # of the prefixes in memory
        self._fetched: set[Prefix] = set()  # from files, and not found since
        self._hits: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def keep(self, ids: Sequence[int], snapshot: Snapshot, start_key: str = "") -> None:
        """Keep the state of `snapshot`, which has read `ids` and no more; what is pending there is left out.

        Args:
            start_key: names what the state began from: a model, an adapter, a tuned state.
        """
        if not len(ids) or snapshot.state is None:
            return
        (prefix,) = prefixes(ids, start_key, [len(ids)])
        with self._lock:
            if self._get(prefix) is None:
                self._add(prefix, Kept(Snapshot(snapshot.state), snapshot.device))

    def find(self, ids: Sequence[int], start_key: str = "") -> tuple[Snapshot, int] | None:
        """The snapshot behind the longest prefix of `ids` in memory, all of them perhaps, and its length."""
        with self._lock:
            lengths = self._lengths.of(start_key, len(ids))
        for prefix in prefixes(ids, start_key, lengths):
            with self._lock:
                level = DISK if prefix in self._fetched else DEVICE if prefix in self._near else HOST
                kept = self._get(prefix)
                if kept is not None:
                    self._fetched.discard(prefix)
                    self._hits[level] += 1
                    return kept.snapshot, prefix.length
        return None

    def only_in_file(self, ids: Sequence[int], start_key: str = "") -> Prefix | None:
        """The longest prefix of `ids` that is kept, where a file alone holds its state: :meth:`fetch` it, then find."""
        if self._files is None or not (there := self._files.lengths(start_key, len(ids))):
            return None
        with self._lock:
            here = self._lengths.of(start_key, len(ids))
        for prefix in prefixes(ids, start_key, here | there):
            with self._lock:
                if prefix in self._near or prefix in self._far:
                    return None
            if self._files.has(prefix):
                return prefix
        return None

    def fetch(self, prefix: Prefix) -> None:
        """Read a state from its file into memory; a damaged file counts as none."""
        snapshot = None if self._files is None else self._files.read(prefix)
        if snapshot is None:
            return
        with self._lock:
            if self._get(prefix) is None:
                self._fetched.add(prefix)
                self._add(prefix, Kept(snapshot, snapshot.device))

    def levels(self) -> Mapping[str, Level]:
        """Each level by its name. A state that was fetched counts as a hit on the disk when it is found first."""
        with self._lock:
            n_bytes = {DEVICE: self._near.n_bytes, HOST: self._far.n_bytes}
            n_bytes[DISK] = 0 if self._files is None else self._files.n_bytes
            return {name: Level(self._hits[name], n) for name, n in n_bytes.items()}

    def start(self) -> None:
        """Begin to write files."""
        if self._files is not None:
            self._files.start()

    def close(self, until: float) -> None:
        """Write what is in memory to files, those used last first, up to the time `until` (of time.monotonic)."""
        if self._files is not None:
            with self._lock:
                levels = (self._near, self._far)
                rest = [(prefix, kept.snapshot) for level in levels for prefix, kept in level.newest_first()]
            self._files.close(rest, until)

    def _get(self, prefix: Prefix) -> Kept | None:
        """The one in memory, on its device."""
        kept = self._near.get(prefix)
        if kept is None and (kept := self._far.pop(prefix)) is not None:
            kept = kept._replace(snapshot=kept.snapshot.to(kept.device))
            self._put(prefix, kept)
        return kept

    def _add(self, prefix: Prefix, kept: Kept) -> None:
        self._lengths.add(prefix.start_key, prefix.length)
        self._put(prefix, kept)

    def _put(self, prefix: Prefix, kept: Kept) -> None:
        for older, its in self._near.put(prefix, kept):
            for oldest, last in self._far.put(older, its._replace(snapshot=its.snapshot.to("cpu"))):
                self._lengths.drop(oldest.start_key, oldest.length)
                self._fetched.discard(oldest)
                if self._files is not None:
                    self._files.offer(oldest, last.snapshot)
