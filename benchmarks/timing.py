"""How the benchmarks of single operators time a call on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def median_ms(call: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
    """Median of some calls, each on its own between two events, after `warm_up` more."""
    times = []
    for _ in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warm_up:])
