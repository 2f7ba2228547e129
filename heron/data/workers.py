"""Processes that work for this one: a Ctrl-C is for the one that started them alone, and none of them outlives it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Workers(ProcessPoolExecutor):
    """As its base class, with spawned processes.

    Args:
        n: processes.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n, multiprocessing.get_context("spawn"), _end_with_parent)

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """As in the base class. This call may start a process, which then ignores SIGINT."""
        with _deaf_to_interrupts():
            return super().submit(fn, *args, **kwargs)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """SIGINT is blocked inside, and for good in processes that are started there, which inherit that."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In a worker: end when the process that started it has, even if it was killed; else it would wait for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="heron-parent", daemon=True).start()
