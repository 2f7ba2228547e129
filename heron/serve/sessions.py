"""States that a server keeps between requests: of sessions by id, saved ones by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from heron.config.serve import NAME
from heron.errors import CheckpointError, ConfigError
from heron.files import new_file, sync
from heron.generation import Engine, Snapshot
from heron.serve.bounded import Bounded, Kept
from heron.serve.folders import SUFFIX, sweep, writable

_MIB = 1 << 20


class NoSuchState(CheckpointError):
    """A name under which no state is saved."""


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
        self._max_bytes = max_bytes
        self._in_memory: Bounded[str] = Bounded(max_bytes)
        self._lock = threading.Lock()  # of these; engines take it, so nobody holds it while a file is written
        self._changing = threading.Lock()  # of the files
        self._given = None if folder is None else writable(Path(folder))
        if self._given is not None:
            sweep(self._given)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None  # made when it is first needed
        self._making = threading.Lock()

    @property
    def _folder(self) -> Path:
        if self._given is not None:
            return self._given
        with self._making:
            if self._temporary is None:
                try:
                    self._temporary = tempfile.TemporaryDirectory(prefix="heron-states-")
                except OSError as error:
                    reason = error.strerror or error
                    raise CheckpointError(f"states: no folder for them can be made: {reason}") from None
            return Path(self._temporary.name)

    # -- by name --------------------------------------------------------------------------------------------------

    def save(self, name: str, snapshot: Snapshot, engine: Engine) -> None:
        """Write a snapshot of `engine`, in place of the state of this name if there is one.

        Raises:
            ConfigError: not a name.
            CheckpointError: too many bytes, or the disk refuses.
        """
        path = self._path(name)
        with self._changing:
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
        with self._changing:
            self._check_room(name, self._about(source).st_size)
            try:
                with new_file(path) as temporary:
                    shutil.copyfile(self._path(source), temporary)
            except CheckpointError as error:
                raise _without(path, name, error) from None

    def delete(self, name: str) -> None:
        """Remove a state. Errors as in :meth:`load`."""
        with self._changing:
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
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                "state: wanted a name of 1 to 64 letters, digits, '.', '_' and '-', the first of them no dot, got "
                f"{name!r:.80}"
            )
        return self._folder / f"{name}{SUFFIX}"

    def _about(self, name: str) -> os.stat_result:
        try:
            return self._path(name).stat()
        except FileNotFoundError:
            raise NoSuchState(f"state {name!r}: there is none of this name") from None

    def _sizes(self) -> dict[str, int]:
        """Bytes by name."""
        sizes = {}
        for path in self._folder.glob(f"*{SUFFIX}"):
            name = path.name.removesuffix(SUFFIX)
            with contextlib.suppress(FileNotFoundError):  # deleted by now
                if NAME.fullmatch(name) and path.is_file():
                    sizes[name] = path.stat().st_size
        return sizes

    def _check_room(self, name: str, n_bytes: int) -> None:
        others = sum(size for other, size in self._sizes().items() if other != name)
        if others + n_bytes > self._max_bytes:
            raise CheckpointError(
                f"state {name!r}: with it the saved states would take {(others + n_bytes) / _MIB:.1f} MiB, and "
                f"{self._max_bytes / _MIB:.1f} are theirs; delete one first, or start with a larger --cache_host"
            )

    # -- by id ----------------------------------------------------------------------------------------------------

    def keep(self, key: str, snapshot: Snapshot) -> None:
        """Keep the state of a session or a response in host memory, in place of an older one."""
        kept = Kept(snapshot.to("cpu"), snapshot.device)
        with self._lock:
            self._in_memory.put(key, kept)

    def find(self, key: str) -> Snapshot | None:
        """The state of a session or a response, on the device that it came on; None: it was forgotten."""
        with self._lock:
            kept = self._in_memory.get(key)
        return None if kept is None else kept.snapshot.to(kept.device)


def _without(path: Path, name: str, error: CheckpointError) -> CheckpointError:
    """The error with the state's name in place of its path."""
    message = str(error).replace(str(path), f"state {name!r}")
    return CheckpointError(message.replace(str(path.parent), "the folder of states"))
