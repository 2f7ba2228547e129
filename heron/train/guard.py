"""What happens to a step whose numbers are wrong: its update never lands, and then the run stops, skips or goes back.

The verdict over a step is taken where its numbers are, so that a GPU is never waited for:
:func:`heron.ops.global_norm.verdict` gives a flag that fused AdamW obeys (`found_inf`: weights, moments and its step
counter stay as they were). The host reads the flag when it comes by anyway, and :class:`Guard` says what to do.
"""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

from heron.config import ON_NONFINITE

STOP, SKIP, REWIND = ON_NONFINITE

_WINDOW = 128  # accepted losses that a spike is measured against
_FEWEST = 16  # of them before anything is called a spike
_SIGMA = 1.4826  # median absolute deviations in the standard deviation of a normal distribution
_LEAST_DEVIATION = 0.01  # of the median: a very even stretch makes no spike of a small bump
_SKIPS, _AMONG = 10, 100  # more skips than this among so many batches: something is wrong with more than a batch
_REWINDS = 3


class Guard:
    """Remembers what the batches of a run were like, and decides about a bad one.

    Args:
        on_nonfinite: stop, skip or rewind.
        spike: a loss above the median of the last 128 accepted ones by more than so many standard deviations (as the
            median absolute deviation estimates them) is bad too; 0: never.
    """

    def __init__(self, on_nonfinite: str, spike: float):
        self.on_nonfinite = on_nonfinite
        self.spike = spike
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._recent: collections.deque[int] = collections.deque(maxlen=_AMONG)  # 1: skipped
        self._rewinds = 0

    def limit(self) -> float:
        """The largest loss that the next step may have."""
        if not self.spike or len(self._losses) < _FEWEST:
            return math.inf
        median = statistics.median(self._losses)
        deviation = _SIGMA * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.spike * max(deviation, _LEAST_DEVIATION * abs(median))

    def accept(self, loss: float) -> None:
        """A good step. Only these enter the window: a bad one must not widen what is thought normal."""
        self._losses.append(loss)
        self._recent.append(0)

    def refuse(self, weights_are_finite: bool) -> tuple[str, str]:
        """A bad step: what to do ("stop", "skip" or "rewind"), and the reason as a clause."""
        if self.on_nonfinite == STOP:
            return STOP, "on_nonfinite is stop"
        self._recent.append(1)
        if sum(self._recent) > _SKIPS:
            return STOP, f"more than {_SKIPS} of {_AMONG} batches were bad"
        if self.on_nonfinite == SKIP and weights_are_finite:
            return SKIP, "on_nonfinite is skip"
        self._rewinds += 1
        if self._rewinds > _REWINDS:
            return STOP, f"it went back {_REWINDS} times already"
        return REWIND, "on_nonfinite is rewind" if weights_are_finite else "a weight is not finite, no batch can help"

    def state(self) -> dict[str, Any]:
        """All of its memory, as JSON values."""
        return {"losses": list(self._losses), "recent": list(self._recent), "rewinds": self._rewinds}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a memory that :meth:`state` gave."""
        self._losses = collections.deque(state["losses"], maxlen=_WINDOW)
        self._recent = collections.deque(state["recent"], maxlen=_AMONG)
        self._rewinds = max(self._rewinds, state["rewinds"])
