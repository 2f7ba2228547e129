"""Folders that a server keeps states in."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

from heron.errors import CheckpointError
from heron.locks import locked

SUFFIX = ".safetensors"


def writable(folder: Path, mode: int = 0o777) -> Path:
    """Make a folder, of this mode, where it is missing; CheckpointError where it cannot be made or written into."""
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unfit(folder, error) from None
    return folder


def sweep(folder: Path) -> None:
    """Delete what a process that was killed has left half written in a folder; CheckpointError where that fails."""
    try:
        # The second are those of safetensors, which writes beside its file, too.
        for pattern in (f".tmp-*{SUFFIX}", ".tmp" + 6 * "[A-Za-z0-9]"):
            for rest in folder.glob(pattern):
                rest.unlink(missing_ok=True)
    except OSError as error:
        raise unfit(folder, error) from None


def lock(folder: Path) -> IO[str]:
    """Have a folder for this process alone, until the file that is given is closed; CheckpointError otherwise."""
    try:
        file = open(folder / "lock", "a", encoding="utf-8")  # noqa: SIM115 (its holder closes it)
    except OSError as error:
        raise unfit(folder, error) from None
    if not locked(file):
        file.close()
        raise CheckpointError(f"{folder}: another server keeps states there")
    return file


def unfit(folder: Path, error: OSError) -> CheckpointError:
    """The error of a folder that refuses."""
    reason = error.strerror or str(error)
    return CheckpointError(f"{folder}: no folder that states can be written into: {reason}")
