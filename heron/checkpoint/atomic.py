"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from heron.errors import CheckpointError


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, onto the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        CheckpointError: the disk or the folder refuses; the message names the path.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would put a file in the place of a device
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise CheckpointError(f"{path}: cannot be written: it is {what}; wanted the name of a file")
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
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
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As :func:`new_file`, for a folder that does not exist yet. The caller syncs the files it puts inside.

    Raises:
        CheckpointError: the disk or the folder refuses; the message names the path.
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
            sync(path.parent.parent)
        temporary.mkdir()
        yield temporary
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
