"""States of prompts in files: the last level of the prefix cache, which outlives the server."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import NamedTuple

from heron.errors import CheckpointError
from heron.generation import Engine, Snapshot
from heron.generation.snapshot import read_snapshot, write_snapshot
from heron.serve.folders import SUFFIX, lock, sweep, unfit, writable
from heron.serve.prefixes import Lengths, Prefix

MOST_WAITING = 8  # states that wait to be written
_NAME = re.compile(rf"[0-9a-f]{{32}}-[1-9][0-9]{{0,11}}-[0-9a-f]{{32}}{re.escape(SUFFIX)}")

_log = logging.getLogger("heron.serve")


class Origin(NamedTuple):
    """What a prefix starts from."""

    identity: str  # another one wherever the same ids could lead to another state
    engine: Engine


class PrefixFiles:
    """States of prefixes in files, each named by hashes of its ids and of what it starts from. Any thread may call.

    It is a cache: a thread of its own writes the states, and where too many wait for it one more is dropped; a damaged
    file is deleted; after an error of the disk nothing is read or written any more. A file appears whole or not at all.

    Args:
        folder: of the files; one process uses it at a time.
        max_bytes: of all files, of which those used longest ago are deleted.
        origin_of: gives what a start key stands for.

    Attributes:
        n_bytes: of all files.

    Raises:
        CheckpointError: the folder cannot be made or written into, or another process uses it.
    """

    def __init__(self, folder: Path, max_bytes: int, origin_of: Callable[[str], Origin]):
        self._folder, self._max_bytes, self._origin_of = writable(folder, 0o700), max_bytes, origin_of
        self._held = lock(folder)
        sweep(folder)
        self._sizes: collections.OrderedDict[str, int] = collections.OrderedDict()  # the one used longest ago first
        self._lengths, self.n_bytes = Lengths(), 0
        self._lock = threading.Lock()  # of these three
        self._waiting: collections.deque[tuple[Prefix, Snapshot]] = collections.deque()
        self._until = math.inf  # when nothing is written any more
        self._is_closing = self._is_off = False
        self._changed = threading.Condition()  # of `_waiting` and `_is_closing`
        self._thread = threading.Thread(target=self._run, name="heron-prefix-files", daemon=True)
        try:
            self._take_over()
        except OSError as error:
            raise unfit(folder, error) from None

    # -- what never waits for the disk ----------------------------------------------------------------------------

    def lengths(self, start_key: str, most: int) -> set[int]:
        """Of the prefixes that begin there and have at most `most` ids."""
        start = self._start_of(start_key)
        with self._lock:
            return set() if self._is_off else self._lengths.of(start, most)

    def has(self, prefix: Prefix) -> bool:
        name = self._name_of(prefix)
        with self._lock:
            return name in self._sizes and not self._is_off

    def offer(self, prefix: Prefix, snapshot: Snapshot) -> None:
        """Have a state written, unless too many wait for that already."""
        with self._changed:
            if len(self._waiting) < MOST_WAITING and not (self._is_closing or self._is_off):
                self._waiting.append((prefix, snapshot))
                self._changed.notify()

    # -- what does ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def read(self, prefix: Prefix) -> Snapshot | None:
        """The state of a prefix, on its engine's device; None: there is none. A file that does not hold it goes."""
        if not self.has(prefix):
            return None
        name, engine = self._name_of(prefix), self._origin_of(prefix.start_key).engine
        try:
            device, n_ids = next(engine.model.parameters()).device, engine.tokenizer.vocab_size
            snapshot = read_snapshot(self._folder / name, name, engine.model.config, n_ids, device)
        except CheckpointError:
            with self._or_off():
                self._delete([name])
            return None
        self._use(name)
        return snapshot

    def close(self, rest: Iterable[tuple[Prefix, Snapshot]], until: float) -> None:
        """Write what waits, then `rest`, most wanted first, up to the time `until` (of time.monotonic), and end.

        Of several calls the earliest time counts.
        """
        with self._changed:
            is_first, self._is_closing = not self._is_closing, True
            self._until = min(until, self._until)
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        if is_first:
            self._write_all(rest)
            self._held.close()

    def _write_all(self, rest: Iterable[tuple[Prefix, Snapshot]]) -> None:
        room, written = self._max_bytes, list[Prefix]()
        for prefix, snapshot in rest:
            room -= snapshot.nbytes
            if room < 0 or self._is_off or time.monotonic() > self._until:
                break
            self._write(prefix, snapshot)
            written.append(prefix)
        for prefix in reversed(written):
            self._use(self._name_of(prefix))

    def _run(self) -> None:
        while (first := self._next()) is not None:
            self._write(*first)

    def _next(self) -> tuple[Prefix, Snapshot] | None:
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return None
                self._changed.wait()
            return None if time.monotonic() > self._until else self._waiting.popleft()

    def _write(self, prefix: Prefix, snapshot: Snapshot) -> None:
        name = self._name_of(prefix)
        if self.has(prefix):
            self._use(name)
        elif snapshot.nbytes <= self._max_bytes and not self._is_off:
            with self._or_off():
                self._make_room(snapshot.nbytes)
                write_snapshot(snapshot, self._folder / name, name)
                self._note(name, (self._folder / name).stat().st_size)
                self._make_room(0)

    @contextlib.contextmanager
    def _or_off(self) -> Generator[None]:
        """A disk that refuses is not asked again."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            with self._lock:
                is_first, self._is_off = not self._is_off, True
            with self._changed:
                self._waiting.clear()
            if is_first:
                _log.error("states of prompts are kept in files no longer, until the next start: %s", error)

    # -- the files ------------------------------------------------------------------------------------------------

    def _start_of(self, start_key: str) -> str:
        return hashlib.blake2b(self._origin_of(start_key).identity.encode(), digest_size=16).hexdigest()

    def _name_of(self, prefix: Prefix) -> str:
        return f"{self._start_of(prefix.start_key)}-{prefix.length}-{prefix.digest.hex()}{SUFFIX}"

    def _take_over(self) -> None:
        """Note the files that other servers have left, or delete them where they are too many."""
        with os.scandir(self._folder) as entries:
            ours = [entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
        for entry in sorted(ours, key=lambda entry: entry.stat().st_mtime_ns):
            self._note(entry.name, entry.stat().st_size)
        self._make_room(0)

    def _note(self, name: str, size: int) -> None:
        with self._lock:
            self._sizes[name] = size
            self.n_bytes += size
            self._lengths.add(*_start_and_length(name))

    def _use(self, name: str) -> None:
        """Make it the one used last, also for the server that comes after this one."""
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        now = time.time_ns()  # finer than what the file system would take
        with contextlib.suppress(OSError):  # deleted by now, or a disk that only reads
            os.utime(self._folder / name, ns=(now, now))

    def _make_room(self, n_bytes: int) -> None:
        """Make room for `n_bytes` more: delete the files that were used longest ago."""
        gone = []
        with self._lock:
            left = self.n_bytes
            for name, size in self._sizes.items():
                if left + n_bytes <= self._max_bytes:
                    break
                left -= size
                gone.append(name)
        self._delete(gone)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._lock:
                size = self._sizes.pop(name, None)
                if size is not None:
                    self.n_bytes -= size
                    self._lengths.drop(*_start_and_length(name))
            (self._folder / name).unlink(missing_ok=True)


def _start_and_length(name: str) -> tuple[str, int]:
    start, length, _ = name.split("-")
    return start, int(length)
