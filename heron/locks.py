"""Files that one process at a time has for itself. The operating system frees them when that process dies."""

from __future__ import annotations

from typing import IO

try:
    import fcntl
except ImportError:  # Windows: two processes that use one file, folder or build at a time go unnoticed there
    fcntl = None


def locked(file: IO) -> bool:
    """Whether this process has a file for itself from now on, until it closes it or dies; False: another one has."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
