"""When a run has to stop before its end: a signal came, or its hours are over."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heron.model import RWKV

_SECONDS_TO_LEAVE = 1.0  # of what was begun in a thread and is no longer wanted

_abandoned: list[threading.Thread] = []


class Stopped(BaseException):
    """A signal came while there was nothing to save yet. No Exception, so that nobody takes it for a failure."""


class _NotWanted(Exception):
    """Leaves a validation or a sample when the run is asked to stop."""


class Preemption:
    """Whether to stop after the current step. Use it in a with statement, from the main thread if signals are to count.

    Until :meth:`begin` a first SIGINT, SIGTERM or SIGUSR1 raises :class:`Stopped`; after it, it is noted in `reason`.
    Either way one line says so at once, from a thread of its own: the main thread may be inside a library's call. A
    second SIGINT says what ending at once would lose, and a third one does what it did before; a second signal of
    another kind says so and ends at once, for it comes from a program, which reads no lines.

    Args:
        max_hours: hours from now; None: no limit.
        say: takes a line for the user; it is called from another thread.
        alone: whether this process may stop when it is asked to; else :meth:`agree` says when all of a run do. A second
            signal then changes nothing: torchrun sends on what the processes have got already.

    Attributes:
        asked: what asked this process to stop: "SIGTERM", "--max_hours 2", ...; None while nothing has.
        reason: why the run stops; None while it goes on.
        at_stake: gives what ending at once would lose, as a clause.
    """

    def __init__(self, max_hours: float | None = None, say: Callable[[str], None] = print, alone: bool = True):
        self.asked: str | None = None
        self.reason: str | None = None
        self._alone = alone
        self.at_stake: Callable[[], str] = lambda: "nothing is lost"
        self._say = say
        self._max_hours = max_hours
        self._begin = time.monotonic()
        self._last_end: float | None = None
        self._longest_step = 0.0
        self._before: dict[int, Any] = {}
        self._saves = False
        self._heard = 0
        self._ears: tuple[int, int] | None = None  # of a pipe into which Python writes each signal's number

    def begin(self) -> None:
        """From now on there is something to save: a signal is noted and nothing else."""
        self._saves = True

    def step_ended(self) -> None:
        """Ask to stop if another step and a save, each as long as the longest step so far, would end too late.

        A step is what lies between two calls, with what came after the first: a validation, a save.
        """
        now = time.monotonic()
        if self._last_end is not None:
            self._longest_step = max(self._longest_step, now - self._last_end)
        self._last_end = now
        if self._max_hours is not None and self.asked is None:
            left = self._begin + 3600 * self._max_hours - now
            if left < 2 * self._longest_step:
                self.ask(f"--max_hours {self._max_hours:g}")

    def ask(self, reason: str) -> None:
        """Ask this process, and with it all of the run, to stop after its step."""
        self.asked = reason
        if self._alone:
            self.reason = reason

    def agree(self, n_asked: float) -> None:
        """Hear how many processes of the run were asked to stop: where it is one or more, all of them do."""
        if n_asked and self.reason is None:
            self.reason = self.asked or "a signal to another process"

    def interruptible(self, work: Callable[[], Any]) -> Any:
        """`work()`, in a thread, so that a signal is obeyed even while it is inside a library's call.

        That call goes on after a stop, unheeded; its thread ends with it. Not for work that PyTorch does.
        """
        if self._ears is None:
            return work()
        result: list[Any] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                result.append(work())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
        except BaseException:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Stopped))
            thread.join(_SECONDS_TO_LEAVE)
            if thread.is_alive():
                _abandoned.append(thread)
            raise
        if failure:
            raise failure[0]
        return result[0]

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._ears = os.pipe()
            if os.name != "nt":
                os.set_blocking(self._ears[1], False)
            self._wakeup = signal.set_wakeup_fd(self._ears[1], warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, args=(self._ears[0],), daemon=True)
            self._listener.start()
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in list(self._before):
            self._let_go(number)
        if self._ears is not None:
            signal.set_wakeup_fd(self._wakeup)
            with contextlib.suppress(BlockingIOError):
                os.write(self._ears[1], b"\0")  # no signal: the end
            self._listener.join()
            for end in self._ears:
                os.close(end)
            self._ears = None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._heard += 1
        if self._heard == 1:
            self.ask(signal.Signals(number).name)
            if not self._saves:
                raise Stopped
        elif not self._alone and number != signal.SIGINT:
            return
        elif number == signal.SIGINT and self._heard == 2:
            self._let_go(number)
        else:
            self._let_go(number)
            time.sleep(0.05)  # for the line that says so
            os.kill(os.getpid(), number)

    def _let_go(self, number: int) -> None:
        if number in self._before:
            signal.signal(number, self._before.pop(number))

    def _listen(self, ear: int) -> None:
        """Say a line for each signal as it comes."""
        heard = 0
        while (number := os.read(ear, 1)) not in (b"", b"\0"):
            name = signal.Signals(number[0]).name
            if name not in ("SIGINT", "SIGTERM", "SIGUSR1"):
                continue
            heard += 1
            if heard == 1 and not self._saves:
                self._say(f"{name}: stopping now, before the first step; the same command goes on")
            elif heard == 1:
                self._say(f"{name}: stopping after this step, which is saved; the same command goes on")
            elif heard == 2 and name == "SIGINT":
                self._say(f"{name} again: once more ends the run at once: {self.at_stake()}")
            elif heard == 2 and self._alone:
                self._say(f"{name}: the second signal ends the run at once: {self.at_stake()}")


def left_behind() -> bool:
    """Whether a library's call that a stop did not wait for is still going on: leave the process by `os._exit`."""
    return any(thread.is_alive() for thread in _abandoned)


@contextlib.contextmanager
def until_stopped(stop: Preemption, model: RWKV) -> Iterator[None]:
    """Leave the block at its next forward pass once the run is asked to stop."""

    def look(*_: object) -> None:
        if stop.asked:
            raise _NotWanted

    hook = model.emb.register_forward_pre_hook(look)
    try:
        yield
    except _NotWanted:
        return
    finally:
        hook.remove()
