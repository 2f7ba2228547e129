"""Requests that arrive while an engine has other work: an iterable is asked in a thread of its own."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_LOOKS = 0.5  # of a wait: on Windows no signal interrupts one without an end


class Incoming(Generic[T]):
    """Takes items from an iterable without waiting for it, unless there is nothing else to do.

    A list or a tuple is read by the caller. Anything else may block, as a pipe does: a thread asks it for as many items
    as are wanted and no more. The thread ends with :meth:`close`, or if it is blocked by then, with the item that it
    waits for; it keeps no process alive.

    Attributes:
        is_over: whether there are no more items.
    """

    def __init__(self, items: Iterable[T]):
        self.is_over = False
        self._items = iter(items)
        self._n_asked = 0  # items that the thread was asked for and whose answers were not taken yet
        self._asked = threading.Semaphore(0)
        self._answers: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        if not isinstance(items, list | tuple):
            self._thread = threading.Thread(target=self._answer, name="heron-incoming", daemon=True)
            self._thread.start()

    def take(self, n: int, wait: bool) -> list[T]:
        """At most `n` items, those that are there. With `wait`: at least one, unless there are no more.

        Raises:
            BaseException: what the iterable raised.
        """
        if self.is_over:
            return []
        if self._thread is None:
            taken = list(itertools.islice(self._items, n))
            self.is_over = len(taken) < n
            return taken
        while self._n_asked < n:
            self._n_asked += 1
            self._asked.release()
        taken = []
        while len(taken) < n:
            try:
                answer = self._answers.get(wait and not taken, _SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                if wait and not taken:
                    continue
                break
            self._n_asked -= 1
            if isinstance(answer, BaseException):
                self.is_over = True
                if not isinstance(answer, StopIteration):
                    raise answer
                break
            taken.append(answer)
        return taken

    def close(self) -> None:
        """Ask for no more items, and wait for the end of a thread that has nothing else to wait for."""
        self.is_over = self._is_closed = True
        self._asked.release()
        is_idle = self._answers.qsize() == self._n_asked
        if self._thread not in (None, threading.current_thread()) and is_idle:
            self._thread.join()

    def _answer(self) -> None:
        while self._asked.acquire() and not self._is_closed:
            try:
                self._answers.put(next(self._items))
            except BaseException as error:  # the caller's to handle; StopIteration is the end
                self._answers.put(error)
                return
