"""A word about work that takes long: ``with progress("learning a vocabulary"): ...`` says nothing for two seconds.

Then a terminal has one line, that counts the seconds and goes away at the end; a file or a pipe gets a line at once
and another at the end. It is written to standard error.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

PATIENCE_S = 2.0
_CLEAR = "\r\x1b[2K"
_stack: list[object] = []  # those at work, of which the innermost alone is shown


@contextlib.contextmanager
def progress(what: str | Callable[[], str]) -> Iterator[Callable[[str], None]]:
    """Say that `what` ("building rosa") is being done while the block runs, if it runs for more than two seconds.

    Args:
        what: a text, or a function that says what is being done by now.

    Yields:
        A function: call it with how far the work is ("3 of 7"), as often as you like.
    """
    me, ended, begun, details = object(), threading.Event(), time.monotonic(), [""]
    _stack.append(me)
    shown = ""

    def show() -> None:
        nonlocal shown
        wait = PATIENCE_S
        while not ended.wait(wait):
            wait = 1.0
            if _stack[-1:] != [me]:
                continue
            now = what if isinstance(what, str) else what()
            if _on_terminal():
                seconds = time.monotonic() - begun
                _write(f"{_CLEAR}heron: {now}{details[0]}, {seconds:.0f} s ")
            elif not shown:
                _write(f"heron: {now}{details[0]} ...\n")
            shown = shown or now

    thread = threading.Thread(target=show, name="heron-progress", daemon=True)
    with contextlib.suppress(RuntimeError):  # a system that starts no more threads: nothing is said
        thread.start()
    whole = False
    try:
        yield lambda detail: details.__setitem__(0, f", {detail}" if detail else "")
        whole = True
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        _stack.remove(me)
        if shown and _on_terminal():
            _write(_CLEAR)
        elif shown and whole:
            _write(f"heron: {shown}: done after {time.monotonic() - begun:.0f} s\n")


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _write(text: str) -> None:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # what nobody reads need not be said
        sys.stderr.write(text)
        sys.stderr.flush()
