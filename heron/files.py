"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from heron.errors import CheckpointError

_LARGEST = 1 << 26  # bytes of a file that is looked into before it is replaced


def as_path(path: str | Path) -> Path:
    """`path` as a Path; CheckpointError for what is none."""
    try:
        return Path(path)
    except TypeError:
        raise CheckpointError(f"wanted the path of a file or folder, got {type(path).__name__}: {path!r}") from None


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, onto the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> None:
    """Remove what a process that was killed left half written or half deleted in a folder."""
    for rest in (*folder.glob(".tmp-*"), *folder.glob(".trash-*")):
        if rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on failure `path` is untouched.

    Raises:
        CheckpointError: the disk or the folder refuses, or `path` is no file (a device, a pipe), which must not be
            replaced; the message names the path.
    """
    temporary = _beside(path)
    _refuse_special(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.filename} is not a folder") from error
    except (OSError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{path}: cannot be written: {_reason(error)}") from error


def write_text(path: Path, content: str) -> None:
    """A file of that text, in UTF-8; CheckpointError as :func:`new_file`."""
    with new_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As :func:`new_file`, for a folder that does not exist yet. The caller syncs the files it puts inside.

    Raises:
        CheckpointError: the disk or the folder refuses; the message names the path.
    """
    temporary = _beside(path)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
            sync(path.parent.parent)
        temporary.mkdir()
        yield temporary
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    except (OSError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{path}: cannot be written: {_reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_foreign(path: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Let a file be named for output only where nothing is lost: it is not there, or its content `is_ours`.

    A file of more than 64 MiB is never ours: these are reports and pictures.

    Raises:
        CheckpointError: a file, or anything else, that a command of this kind has not written.
    """
    _refuse_special(path)
    if not os.path.lexists(path):
        return
    try:
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= _LARGEST else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    if not is_ours(content):
        raise CheckpointError(f"{path}: is there already and was not written by this command; name another file")


def _refuse_special(path: Path) -> None:
    """CheckpointError for a device, a pipe or a socket: who replaces /dev/null breaks the machine for everybody."""
    special = (stat.S_ISCHR, stat.S_ISBLK, stat.S_ISFIFO, stat.S_ISSOCK)
    with contextlib.suppress(OSError, ValueError):  # it is not there, or can't be: writing it will say so
        is_stream = path.is_symlink() and os.readlink(path).startswith("/proc/")  # such as /dev/stdout
        mode = os.stat(path).st_mode
        if is_stream or any(is_one(mode) for is_one in special):
            raise CheckpointError(f"{path}: cannot be written: it is a device or a pipe; wanted the name of a file")


def _beside(path: Path) -> Path:
    """Where what is to become `path` is written first; CheckpointError for what can't be a file's name."""
    if path.name in ("", "..") or "\0" in str(path):
        raise CheckpointError(f"{str(path)!r}: cannot be written: wanted the name of a file")
    return path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")


def _reason(error: OSError | UnicodeEncodeError) -> str:
    if isinstance(error, UnicodeEncodeError):  # a library takes no name that is not UTF-8
        return "its name is not UTF-8; choose another"
    return error.strerror or str(error)
