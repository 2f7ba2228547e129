"""Requests that come at once begin a few in each turn of the event loop, so that no stream waits for all of them."""

from __future__ import annotations

import asyncio
import collections

AT_ONCE = 16  # requests in a turn: some milliseconds


class Turns:
    """Lets requests begin in the order in which they come, in one event loop."""

    def __init__(self) -> None:
        self._n_begun = 0  # in this turn of the loop
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def wait(self) -> None:
        """Wait until it is the caller's turn, if others have come before."""
        loop = asyncio.get_running_loop()
        if not self._n_begun:
            loop.call_soon(self._next)
        if self._n_begun < AT_ONCE:
            self._n_begun += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        turns = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
        self._n_begun = len(turns)
        if turns:
            asyncio.get_running_loop().call_soon(self._next)
        for turn in turns:
            if not turn.done():  # it was cancelled
                turn.set_result(None)
