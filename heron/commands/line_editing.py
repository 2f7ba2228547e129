"""Line editing and history at a terminal: the arrow keys bring earlier lines back.

Both are Python's readline. Where it is absent (Windows), or where no terminal is, lines are read as they come.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

MOST_LINES = 1000


def history_file() -> Path:
    """``chat_history`` in ``HERON_CACHE``, or in ``heron`` in the user's state folder (``XDG_STATE_HOME``)."""
    if chosen := os.environ.get("HERON_CACHE"):
        return Path(chosen) / "chat_history"
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(state) / "heron" / "chat_history"


def reader() -> Callable[[str], str]:
    """`input`, with editing and a history where there is a terminal. The history is the user's alone to read."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    try:
        import readline
    except ImportError:
        return input
    file = history_file()
    with contextlib.suppress(OSError, UnicodeError):  # none yet, or one that can't be read: it is a comfort, no more
        readline.read_history_file(file)
    readline.set_history_length(MOST_LINES)

    def read(prompt: str) -> str:
        above, newline, shown = prompt.rpartition("\n")  # readline counts columns, and takes the prompt for one line
        print(above + newline, end="", flush=True)
        line = input(shown)
        with contextlib.suppress(OSError):
            _keep(readline, file)
        return line

    return read


def _keep(readline: types.ModuleType, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    file.chmod(0o600)
    readline.write_history_file(file)
