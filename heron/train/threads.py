"""How many CPU threads compute, and how they wait for each other where other programs want the same cores.

Threads that spin while they wait burn the time that the thread they wait for needs: on two cores shared with seven
busy programs, a training step on two spinning threads took ten times as long as on one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from heron.errors import ConfigError, counted

if TYPE_CHECKING:
    import torch

    from heron.report import Reporter

_SPINS = "1000"  # of GNU's OpenMP, which is in PyTorch's Linux wheels: microseconds, then sleep; its usual: 300,000
_BLOCK_MS = "1"  # of LLVM's and Intel's, in those for macOS and Windows; their usual: 200 ms
_FEWEST_REFUSED = 256  # a small machine may well go on with a run of a larger one
_FASTER = 2.0  # a smaller number of threads must be this many times as fast to be taken
_PASSES, _SECONDS = 60, 0.4  # of a trial, whichever comes first
_SLOWER = 10.0
_RECENT, _BASELINE = 3, 8  # steps that are compared, and those they are compared with


def wait_briefly() -> None:
    """Have threads that wait go to sleep soon. Of use before torch is imported; what the user has set stays."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
        os.environ["KMP_BLOCKTIME"] = _BLOCK_MS


def most() -> int:
    """The largest number of threads that is accepted on this machine."""
    return max(_FEWEST_REFUSED, 8 * (os.cpu_count() or 1))


def take(number: int) -> None:
    """Compute on that many threads, 0: as many as now; ConfigError for more than this machine makes without harm."""
    if not 0 <= number <= most():
        cores = os.cpu_count() or 1
        raise ConfigError(
            f"threads: wanted 0 (as many as are of use) to {most()}, got {number}; this machine has {cores} cores"
        )
    if number:
        import torch

        torch.set_num_threads(number)


def fewer(most_threads: int) -> tuple[int, float]:
    """The number of threads that computes fastest now: `most_threads`, or fewer where these are much faster.

    Returns:
        The number, and how many times as fast as `most_threads` it is (1.0 where it is the same).
    """
    seconds = {most_threads: _trial(most_threads)}
    alone = _trial(1) if most_threads > 1 else seconds[most_threads]
    if seconds[most_threads] < _FASTER * alone:
        return most_threads, 1.0
    seconds[1] = alone
    number = most_threads // 2
    while number > 1:
        seconds[number] = _trial(number)
        number //= 2
    best = min(seconds, key=seconds.__getitem__)
    return best, seconds[most_threads] / seconds[best]


def _trial(number: int) -> float:
    """Seconds of a pass over 4 MB on that many threads.

    One thread is as fast as several on no idle machine: the pass is long enough to be shared.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        values, begun, passes = torch.ones(1 << 20), time.perf_counter(), 0
        while passes < _PASSES and time.perf_counter() - begun < _SECONDS:
            values.mul_(1.0).exp_().log_()
            passes += 1
        return (time.perf_counter() - begun) / passes
    finally:
        torch.set_num_threads(before)


class Pace:
    """Whether steps have become much slower than they were."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._usual: float | None = None

    def slowed(self, seconds: float) -> float | None:
        """Hand in what a step took. How many times as long as usual the last ones took, where that is ten or more.

        It is told once: from then on the steps are compared with those that follow.
        """
        self._seconds.append(seconds)
        if self._usual is None:
            if len(self._seconds) > _BASELINE:
                self._usual = statistics.median(self._seconds[1:])  # the first one makes what is made once
                self._seconds.clear()
            return None
        del self._seconds[:-_RECENT]
        factor = min(self._seconds) / self._usual
        if len(self._seconds) < _RECENT or factor < _SLOWER:
            return None
        self._seconds.clear()
        self._usual = None
        return factor


def settle(wanted: int, device: torch.device) -> tuple[int, str]:
    """The number of threads that a run begins with, and why, as a clause; "" where there is nothing to say."""
    import torch

    if wanted:
        return wanted, ""
    usual = torch.get_num_threads()
    if device.type != "cpu" or usual == 1:
        return usual, ""
    number, times = fewer(usual)
    if number == usual:
        return usual, ""
    return number, f"the machine is busy: {times:.0f} times as fast as {usual}, which --threads {usual} asks for"


def begin(now: int, asked: int, device: torch.device, before: dict[str, Any] | None, say: Callable[[str], None]) -> int:
    """The number of threads from now on: as asked, else that of the run that goes on, else what is fastest here now.

    Args:
        now: the number so far.
        asked: 0: none was.
        before: what the checkpoint that the run goes on from says of what it was made with; None: a fresh start.
    """
    import torch

    from heron import machine

    machine.settle_threads()
    if asked:
        return now
    usual = torch.get_num_threads()
    if before is None:
        number, reason = settle(0, device)
        if reason:
            say(f"threads: {number}: {reason}")
    else:
        number = before.get("threads", usual)
        number = _use(number if number <= most() else usual)
        if device.type == "cpu" and number > 1:
            best, times = fewer(number)
            if best != number:
                say(
                    f"the machine is busy: on {counted(best, 'threads')} this run would be {times:.0f} times as "
                    f"fast as on its {number}, and not bit-exact; --threads {best} chooses that"
                )
    return _use(number)


def adapt(before: int, asked: int, device: torch.device, reporter: Reporter, step: int, slower: float) -> int:
    """After steps that took ten times as long as those before: compute on fewer threads where that helps.

    Args:
        before: the number so far.
        asked: the number that was asked for, which stays; 0: none was.
        slower: how many times as long.

    Returns:
        The number from now on.
    """
    if device.type != "cpu":
        return before
    best, times = fewer(before)
    what = f"step {step}: steps take {slower:.0f} times as long as they did"
    if best == before:
        reporter.note(f"{what}; fewer than {before} threads would not help")
        return before
    if asked:
        reporter.note(f"{what}: the machine is busy; --threads {best} would be {times:.0f} times as fast now")
        return before
    now = _use(best)
    reporter.refused({"step": step, "threads": best, "threads_before": before})
    reporter.note(
        f"{what}: the machine is busy; going on with {counted(best, 'threads')}, not {before}, which are "
        f"{times:.0f} times as fast now (not bit-exact from here on with a run that keeps them)"
    )
    return now


def _use(number: int) -> int:
    """So many threads from now on, or one where the system starts no more; gives the number."""
    import torch

    from heron import machine

    torch.set_num_threads(number)
    machine.settle_threads()
    return torch.get_num_threads()
