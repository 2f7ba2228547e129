"""Standard input, output and error: a caller that left us without them, a reader that has gone, lines of ours."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence

_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, a terminal
_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}
_closed: set[str] = set()  # by the caller, of this process or of the last command


def was_closed(name: str) -> bool:
    """Whether "stdin", "stdout" or "stderr" was closed when :func:`open_closed` was called last."""
    return name in _closed


def open_closed() -> None:
    """Open the streams that the caller closed (``>&-``) on the null device.

    Otherwise the next file that is opened would get their number, and what is printed would land in it.
    """
    _closed.clear()
    for name, number in _NUMBERS.items():
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


class _Lasting(io.FileIO):
    """Standard output or error that drops what can't be written, and says so once.

    Attributes:
        lost: the first error, for another reason than that the reader has gone; None: there was none.
    """

    said, lost = False, None

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                self.lost = self.lost or error
            if not self.said and self.fileno() == 1:
                self.said = True
                note(f"standard output: {error.strerror}; what can't be printed is dropped, and the work goes on")
            return memoryview(data).nbytes


@contextlib.contextmanager
def lasting(names: Sequence[str]) -> Iterator[None]:
    """Inside, what can't be written to these of "stdout" and "stderr" is dropped, and the work goes on without.

    Raises:
        OSError: at the end, where standard output was lost for another reason than that its reader has gone.
    """
    before: dict[str, io.TextIOWrapper] = {name: getattr(sys, name) for name in names}
    made: dict[str, _Lasting] = {}
    for name, stream in before.items():
        if not _is_file(name) or (os.name == "nt" and stream.isatty()):
            continue  # a caller of ours has put something in its place, or it is a console
        stream.flush()
        made[name] = _Lasting(stream.fileno(), "w", closefd=False)
        buffered = (stream.line_buffering, stream.write_through)
        setattr(
            sys, name, io.TextIOWrapper(io.BufferedWriter(made[name]), stream.encoding, stream.errors, None, *buffered)
        )
    try:
        yield
    finally:
        for name in made:
            getattr(sys, name).flush()
            setattr(sys, name, before[name])
    if "stdout" in made and (lost := made["stdout"].lost) is not None:
        raise OSError(lost.errno, lost.strerror, "standard output")


def _is_file(name: str) -> bool:
    """Whether a stream still writes to the file that this process was given for it."""
    stream = getattr(sys, name)
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == _NUMBERS[name]
    except ValueError:
        return False


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
    """Print a line of ours to standard error."""
    print(f"heron: {one_line(line)}", file=sys.stderr)


def one_line(message: object) -> str:
    """A message of several lines as one."""
    return " ".join(line.strip() for line in str(message).splitlines() if line.strip())
