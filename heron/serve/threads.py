"""Work of the event loop that may last: in a thread, where it would hold up the streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

SHORT = 20_000  # characters or ids: about a millisecond, and less than a thread would cost beside a busy engine

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def worked(size: int, function: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T:
    """What `function` gives; in a thread where `size`, the characters or ids that it goes through, is large."""
    if size <= SHORT:
        return function(*args, **options)
    return await asyncio.to_thread(function, *args, **options)
