"""When a run has to stop before its end: a signal came, or its hours are over."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


class Preemption:
    """Whether to stop after the current step. Use it in a with statement, from the main thread if signals are to count.

    The first SIGINT, SIGTERM or SIGUSR1 is noted and nothing else; a second one does what it did before.

    Args:
        max_hours: hours from now; None: no limit.

    Attributes:
        reason: "SIGTERM", "--max_hours 2", ...; None while there is none.
    """

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self._max_hours = max_hours
        self._begin = time.monotonic()
        self._last_end: float | None = None
        self._longest_step = 0.0
        self._before: dict[int, Any] = {}

    def step_ended(self) -> None:
        """Ask to stop if another step and a save, each as long as the longest step so far, would end too late.

        A step is what lies between two calls, with what came after the first: a validation, a save.
        """
        now = time.monotonic()
        if self._last_end is not None:
            self._longest_step = max(self._longest_step, now - self._last_end)
        self._last_end = now
        if self._max_hours is not None and self.reason is None:
            left = self._begin + 3600 * self._max_hours - now
            if left < 2 * self._longest_step:
                self.reason = f"--max_hours {self._max_hours:g}"

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._let_go()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        self._let_go()

    def _let_go(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
