"""Figures as people read them: means, times, and thousands."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def duration(seconds: float) -> str:
    """``0:07``, ``1:02:03``, ``3d 04h``; ``?`` for what is not a time."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    if days:
        return f"{days}d {rest:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def thousands(value: float) -> str:
    """Three or four figures: ``812``, ``12.3k``, ``1.20M``."""
    if not math.isfinite(value):
        return "?"
    if value < 999.5:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if value < 999_950 else f"{value / 1e6:.2f}M"
