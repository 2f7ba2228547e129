"""What benchmarks share: the device they need, and how those of single operators time a call on a GPU."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from heron import machine
from heron.errors import ConfigError


def need_gpu(parser: argparse.ArgumentParser, hint: str = "") -> None:
    """Leave with one line where there is no CUDA device."""
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: this needs a CUDA device, and there is none{hint}\n")


def device_of(parser: argparse.ArgumentParser, wanted: str) -> torch.device:
    """The device of that name, or auto; leave with one line where it is not there."""
    try:
        return torch.device(machine.choose_device(wanted).value)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


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
