"""States that a server keeps between requests: of prompts by tokens, of sessions by id, saved ones by name."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from heron.errors import CheckpointError, ConfigError
from heron.files import new_file, sync
from heron.generation import Engine, Snapshot

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".safetensors"
_MIB = 1 << 20
_Key = TypeVar("_Key", bound=Hashable)


class NoSuchState(CheckpointError):
    """A name under which no state is saved."""


class _Kept(NamedTuple):
    snapshot: Snapshot
    device: torch.device  # that it came on


class _Bounded(Generic[_Key]):
    """Snapshots by key, up to a number of bytes: where they are too many, the ones used longest ago go."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._kept: collections.OrderedDict[_Key, _Kept] = collections.OrderedDict()

    def put(self, key: _Key, kept: _Kept) -> list[tuple[_Key, _Kept]]:
        """Keep one, in place of another with its key, and give those that go for it: itself where it is too large."""
        self.pop(key)
        self._kept[key] = kept
        self._n_bytes += kept.snapshot.nbytes
        gone = []
        while self._n_bytes > self._max_bytes:
            oldest = next(iter(self._kept))
            gone.append((oldest, self._kept[oldest]))
            self.pop(oldest)
        return gone

    def get(self, key: _Key) -> _Kept | None:
        """The one with a key, which is then used last."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def pop(self, key: _Key) -> _Kept | None:
        """The one with a key, which is kept no longer."""
        kept = self._kept.pop(key, None)
        self._n_bytes -= 0 if kept is None else kept.snapshot.nbytes
        return kept


class _Prefix(NamedTuple):
    start_key: str
    length: int
    digest: bytes


class PrefixCache:
    """The states behind the beginnings of prompts. A prompt that begins like one before is read from there on.

    A state moves from the device that it came on to host memory, and is then forgotten, as room is wanted for others
    that were used later. Prefixes are told apart by a hash of 128 bits. Any thread may call.

    Args:
        max_bytes: of the states on the device.
        host_bytes: of those in host memory.
    """

    def __init__(self, max_bytes: int, host_bytes: int):
        self._near: _Bounded[_Prefix] = _Bounded(max_bytes)
        self._far: _Bounded[_Prefix] = _Bounded(host_bytes)
        self._lengths: dict[str, collections.Counter[int]] = {}  # of the prefixes kept, by their start
        self._lock = threading.Lock()

    def keep(self, ids: Sequence[int], snapshot: Snapshot, start_key: str = "") -> None:
        """Keep the state of `snapshot`, which has read `ids` and no more; what is pending there is left out.

        Args:
            start_key: names what the state began from: a model, an adapter, a tuned state.
        """
        if not len(ids) or snapshot.state is None:
            return
        ((n, digest),) = _digests(ids, [len(ids)])
        key, kept = _Prefix(start_key, n, digest), _Kept(Snapshot(snapshot.state), snapshot.device)
        with self._lock:
            if self._get(key) is None:
                self._lengths.setdefault(start_key, collections.Counter())[n] += 1
                self._put(key, kept)

    def find(self, ids: Sequence[int], start_key: str = "") -> tuple[Snapshot, int] | None:
        """The snapshot behind the longest prefix of `ids` that is kept, all of them perhaps, and its length."""
        with self._lock:
            lengths = sorted(n for n in self._lengths.get(start_key, ()) if n <= len(ids))
        for n, digest in reversed(list(_digests(ids, lengths))):
            with self._lock:
                kept = self._get(_Prefix(start_key, n, digest))
            if kept is not None:
                return kept.snapshot, n
        return None

    def _get(self, key: _Prefix) -> _Kept | None:
        """The one with a key, on its device."""
        kept = self._near.get(key)
        if kept is None and (kept := self._far.pop(key)) is not None:
            kept = kept._replace(snapshot=kept.snapshot.to(kept.device))
            self._put(key, kept)
        return kept

    def _put(self, key: _Prefix, kept: _Kept) -> None:
        for older, its in self._near.put(key, kept):
            for (start_key, n, _), _ in self._far.put(older, its._replace(snapshot=its.snapshot.to("cpu"))):
                lengths = self._lengths[start_key]
                lengths[n] -= 1
                if not lengths[n]:
                    del lengths[n]
                if not lengths:
                    del self._lengths[start_key]


def _digests(ids: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Each of `lengths`, ascending, with a hash of so many of the first ids."""
    data, digest, start = np.asarray(ids, dtype=np.int64), hashlib.blake2b(digest_size=16), 0
    for n in lengths:
        digest.update(data[start:n].tobytes())
        start = n
        yield n, digest.copy().digest()


class StateStore:
    """Saved states in files, by name, and the states of sessions and responses in memory, by id. Any thread may call.

    A name has 1 to 64 letters, digits, ``.``, ``_`` and ``-``, and begins with no dot. A file appears whole or not at
    all, and messages name no path.

    Args:
        folder: of the files; None: one that goes with the process.
        max_bytes: of all files, and of all states in memory, of which those used longest ago are forgotten.

    Raises:
        CheckpointError: the folder cannot be made or written into.
    """

    def __init__(self, folder: str | Path | None, max_bytes: int):
        self._wanted, self._max_bytes = None if folder is None else Path(folder), max_bytes
        self._lock = threading.Lock()
        self._in_memory: _Bounded[str] = _Bounded(max_bytes)
        if folder is not None:
            _ = self._folder

    @functools.cached_property
    def _folder(self) -> Path:
        try:
            if self._wanted is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="heron-states-")
                return Path(self._temporary.name)
            self._wanted.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._wanted).close()
            # Of a process that was killed; the second are those of safetensors, which writes beside its file, too.
            for pattern in (f".tmp-*{_SUFFIX}", ".tmp" + 6 * "[A-Za-z0-9]"):
                for rest in self._wanted.glob(pattern):
                    rest.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"{self._wanted or 'states'}: no folder that states can be written into: {reason}"
            ) from None
        return self._wanted

    # -- by name --------------------------------------------------------------------------------------------------

    def save(self, name: str, snapshot: Snapshot, engine: Engine) -> None:
        """Write a snapshot of `engine`, in place of the state of this name if there is one.

        Raises:
            ConfigError: not a name.
            CheckpointError: too many bytes, or the disk refuses.
        """
        path = self._path(name)
        with self._lock:
            self._check_room(name, snapshot.nbytes)
            try:
                engine.save(snapshot, path)
            except CheckpointError as error:
                raise _without(path, name, error) from None

    def load(self, name: str, engine: Engine) -> Snapshot:
        """The snapshot of a name, for `engine`.

        Raises:
            ConfigError: not a name.
            NoSuchState: there is none.
            CheckpointError: another model's, or damaged.
        """
        path = self._path(name)
        self._about(name)
        try:
            return engine.load(path)
        except CheckpointError as error:
            raise _without(path, name, error) from None

    def fork(self, source: str, name: str) -> None:
        """Copy the state `source`, in place of the state `name` if there is one. Errors as in load and save."""
        path = self._path(name)
        with self._lock:
            self._check_room(name, self._about(source).st_size)
            try:
                with new_file(path) as temporary:
                    shutil.copyfile(self._path(source), temporary)
            except CheckpointError as error:
                raise _without(path, name, error) from None

    def delete(self, name: str) -> None:
        """Remove a state. Errors as in :meth:`load`."""
        with self._lock:
            self._about(name)
            self._path(name).unlink(missing_ok=True)
            sync(self._folder)

    def list(self) -> Sequence[str]:
        """The names, in order."""
        return sorted(self._sizes())

    def version(self, name: str) -> str:
        """A text that is another one each time that a state is saved under this name. Errors as in :meth:`load`."""
        about = self._about(name)
        return f"{about.st_ino:x}-{about.st_mtime_ns:x}"

    def _path(self, name: str) -> Path:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                "state: wanted a name of 1 to 64 letters, digits, '.', '_' and '-', the first of them no dot, got "
                f"{name!r:.80}"
            )
        return self._folder / f"{name}{_SUFFIX}"

    def _about(self, name: str) -> os.stat_result:
        try:
            return self._path(name).stat()
        except FileNotFoundError:
            raise NoSuchState(f"state {name!r}: there is none of this name") from None

    def _sizes(self) -> dict[str, int]:
        """Bytes by name."""
        sizes = {}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            name = path.name.removesuffix(_SUFFIX)
            with contextlib.suppress(FileNotFoundError):  # deleted by now
                if _NAME.fullmatch(name) and path.is_file():
                    sizes[name] = path.stat().st_size
        return sizes

    def _check_room(self, name: str, n_bytes: int) -> None:
        others = sum(size for other, size in self._sizes().items() if other != name)
        if others + n_bytes > self._max_bytes:
            raise CheckpointError(
                f"state {name!r}: with it the saved states would take {(others + n_bytes) / _MIB:.1f} MiB, and "
                f"{self._max_bytes / _MIB:.1f} are theirs; delete one first"
            )

    # -- by id ----------------------------------------------------------------------------------------------------

    def keep(self, key: str, snapshot: Snapshot) -> None:
        """Keep the state of a session or a response in host memory, in place of an older one."""
        kept = _Kept(snapshot.to("cpu"), snapshot.device)
        with self._lock:
            self._in_memory.put(key, kept)

    def find(self, key: str) -> Snapshot | None:
        """The state of a session or a response, on the device that it came on; None: it was forgotten."""
        with self._lock:
            kept = self._in_memory.get(key)
        return None if kept is None else kept.snapshot.to(kept.device)

    def forget(self, key: str) -> bool:
        """Forget a session or a response; whether it was there."""
        with self._lock:
            return self._in_memory.pop(key) is not None


def _without(path: Path, name: str, error: CheckpointError) -> CheckpointError:
    """The error with the state's name in place of its path."""
    message = str(error).replace(str(path), f"state {name!r}")
    return CheckpointError(message.replace(str(path.parent), "the folder of states"))
