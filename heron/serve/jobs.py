"""Texts that are wanted of an engine, as HTTP sees them: how many may wait, and what was drawn of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from heron.serve.engines import Engines
from heron.serve.link import Link
from heron.serve.orders import Drawn, Order
from heron.serve.refusals import ENGINE_FAILED, Refusal, engine_failed, stopping, too_busy

SECONDS_A_PIECE = 4e-5  # of rest, after each piece that is given to a job: twice what it takes to send one


class Job:
    """A text that is being written.

    Attributes:
        n_prompt: tokens of its prompt.
        n_cached: of them those that the prefix cache had read.
        n_drawn: tokens drawn so far.
        is_over: whether no more will be drawn.
    """

    def __init__(self, order: Order):
        self.number, self.n_prompt = order.number, len(order.request.prompt)
        self.n_cached = self.n_drawn = 0
        self.is_over = False
        self._arrived_at = time.monotonic()
        self._drawn: Drawn | None = None  # since it was last looked at
        self._waits: asyncio.Future[None] | None = None

    @property
    def seconds(self) -> float:
        """Since it arrived."""
        return time.monotonic() - self._arrived_at

    async def drawn(self) -> AsyncGenerator[Drawn]:
        """What is drawn, up to the piece with a `finish`; what comes while a piece is used is one piece.

        Raises the error that ends it instead.
        """
        while True:
            if self._drawn is None:
                self._waits = asyncio.get_running_loop().create_future()
                await self._waits
            drawn, self._drawn = self._drawn, None
            if drawn is None:
                continue
            if drawn.error is not None:
                raise drawn.error
            yield drawn
            if drawn.finish is not None:
                return

    def take(self, new: Drawn) -> None:
        """Give it what was drawn, in its event loop."""
        self.n_drawn += new.n
        self.n_cached = new.n_cached
        self.is_over = new.finish is not None or new.error is not None
        if (old := self._drawn) is not None:
            new = new._replace(text=old.text + new.text, n=old.n + new.n, tokens=(*old.tokens, *new.tokens))
        self._drawn = new
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)


class Desk:
    """Takes orders for one engine.

    Args:
        engine: its name.
        rows: texts that it writes side by side.
        queue: orders that may wait for a place in it.
        link: to the engines.

    Attributes:
        has_failed: whether the engine is unable to go on.
    """

    def __init__(self, engine: str, rows: int, queue: int, link: Link):
        self._engine, self._rows, self._queue, self._link = engine, rows, queue, link
        self._open: dict[int, Job] = {}
        self._held: list[Drawn] = []
        self._rests = False  # meanwhile what was drawn is held
        self._is_open = self.has_failed = False

    @property
    def n_waiting(self) -> int:
        return max(0, len(self._open) - self._rows)

    @property
    def n_writing(self) -> int:
        return min(len(self._open), self._rows)

    @property
    def is_ready(self) -> bool:
        """Whether an order would be taken."""
        return self._is_open and not self.has_failed

    def open(self) -> None:
        self._is_open = True

    def close(self) -> None:
        """Take no more orders."""
        self._is_open = False

    async def submit(self, orders: Sequence[Order]) -> list[Job]:
        """Have texts written, all of them or none.

        Raises:
            Refusal: too many wait already, the engine has failed, or is being stopped; no grammar can be made.
            HeronError: a saved state that is not there any more.
        """
        if self.has_failed:
            raise engine_failed(503)
        if not self._is_open:
            raise stopping()
        if len(self._open) + len(orders) > self._queue + self._rows:
            raise too_busy(f"{self.n_waiting} requests wait already; try again")
        jobs = [Job(order) for order in orders]
        self._open |= {job.number: job for job in jobs}
        if all(order.form is None and order.start.state is None for order in orders):
            self._link.tell(Engines.submit, self._engine, orders)
            return jobs
        asked = asyncio.ensure_future(self._link.ask(Engines.submit, self._engine, orders))
        try:
            await asyncio.shield(asked)  # grammars and files take a while, and only an order that is there can be ended
        except asyncio.CancelledError:
            asked.add_done_callback(lambda _: self._withdraw(jobs))
            raise
        except BaseException:
            self._withdraw(jobs)
            raise
        return jobs

    def _withdraw(self, jobs: Sequence[Job]) -> None:
        """End texts of which one cannot be written, or for which nobody waits any more."""
        for job in jobs:
            self.cancel(job)
            self._open.pop(job.number, None)

    def cancel(self, job: Job) -> None:
        """End a text that nobody wants any more."""
        if not job.is_over:
            self._link.tell(Engines.cancel, self._engine, job.number)

    def take(self, drawn: Sequence[Drawn]) -> None:
        """Give the jobs what was drawn for them, in their event loop.

        Where there are many, what comes right behind is held for a few milliseconds, in which the loop serves others;
        each job then gets several tokens as one piece.
        """
        self._held += drawn
        if not self._rests:
            self._give()

    def _give(self) -> None:
        """Give the jobs what is held, then rest."""
        drawn, self._held = self._held, []
        for piece in drawn:
            job = self._open.get(piece.number)
            if job is None:
                continue
            job.take(piece)
            if job.is_over:
                del self._open[piece.number]
                self.has_failed |= isinstance(piece.error, Refusal) and piece.error.code == ENGINE_FAILED
        self._rests = bool(drawn)
        if drawn:
            seconds = SECONDS_A_PIECE * len({piece.number for piece in drawn})
            asyncio.get_running_loop().call_later(seconds, self._give)
