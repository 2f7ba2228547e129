"""Standard input, output and error: a caller that left us without them, a reader that has gone, lines of ours."""

from __future__ import annotations

import contextlib
import os
import sys

_closed: set[str] = set()  # by the caller, of this process or of the last command


def was_closed(name: str) -> bool:
    """Whether "stdin", "stdout" or "stderr" was closed when :func:`open_closed` was called last."""
    return name in _closed


def open_closed() -> None:
    """Open the streams that the caller closed (``>&-``) on the null device.

    Otherwise the next file that is opened would get their number, and what is printed would land in it.
    """
    _closed.clear()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _closed.add(name)
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            _closed.add(name)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def flush() -> None:
    """Write out what is buffered. What can't be written is dropped, or the interpreter would complain at its end.

    Raises:
        OSError: it can't be written to standard output, for another reason than that its reader has gone.
    """
    lost = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            if stream is sys.stdout and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                lost = error
            with contextlib.suppress(OSError, ValueError):  # it is no file, or closed
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)
    if lost is not None:
        raise lost


def note(line: str) -> None:
    print(f"heron: {one_line(line)}", file=sys.stderr)


def one_line(message: object) -> str:
    return " ".join(line.strip() for line in str(message).splitlines() if line.strip())
