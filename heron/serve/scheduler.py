"""One thread runs an engine: requests join in order of arrival, leave when they end, and their texts go to the loop.

The thread and the event loop of the server share Python's lock. So that one does not hold up the other, a stream gets
several tokens at once where there are many streams: see `SECONDS_A_STREAM`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator

from heron.errors import HeronError
from heron.generation import Constraint, Engine, OpenSequence, Request, Snapshot, Token
from heron.serve.grammar import Grammar
from heron.serve.refusals import Refusal, stopping, too_busy, too_slow
from heron.serve.sessions import PrefixCache

_log = logging.getLogger("heron.serve")
SECONDS_A_STREAM = 2e-4  # a handover to one stream at most in each; the event loop needs a tenth of it for one
_SECONDS_BETWEEN_LOOKS = 0.25  # at the clock, for requests whose time is over


@dataclasses.dataclass
class Drawn:
    """What was drawn for a job since the last handover."""

    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish: str | None = None  # "end", "stop" or "length" with the last
    error: Exception | None = None  # instead of any more


class Job:
    """A text that is wanted of an engine; made in the event loop that waits for it.

    Args:
        request: with token ids as its prompt.
        timeout: seconds from now after which it fails.
        start_key: what the sequence begins from, in the prefix cache: the names of a model and of a state.
        keeps: whether the state behind its text is wanted for the prefix cache.

    Attributes:
        n_cached: tokens of the prompt that the prefix cache had read.
        ids: of its prompt, then also those drawn.
        behind: the state that it ended with, where `keeps`.
    """

    def __init__(self, request: Request, timeout: float, start_key: str = "", keeps: bool = False):
        self.request, self.start_key, self.keeps = request, start_key, keeps
        self.arrived_at = time.monotonic()
        self.deadline = self.arrived_at + timeout
        self.ids = [int(token) for token in request.prompt]
        self.n_prompt, self.n_cached = len(self.ids), 0
        self.behind: Snapshot | None = None
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self._drawn: list[Drawn] = []
        self._waits: asyncio.Future[None] | None = None

    @property
    def n_drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.ids) - self.n_prompt

    @property
    def seconds(self) -> float:
        """Since it arrived."""
        return time.monotonic() - self.arrived_at

    async def drawn(self) -> AsyncGenerator[Drawn]:
        """What is drawn, up to the piece with a `finish`. Raises the error that ends it instead."""
        while True:
            if not self._drawn:
                self._waits = self._loop.create_future()
                await self._waits
            pieces, self._drawn = self._drawn, []
            for piece in pieces:
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.finish is not None:
                    return

    def take(self, drawn: Drawn) -> None:
        """Give it what was drawn, in its event loop."""
        self._drawn.append(drawn)
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)


class Scheduler:
    """Runs an engine in a thread of its own for any number of jobs.

    Args:
        engine: that nobody else opens sequences in.
        queue: jobs that may wait for a place in it.
        cache: where states of read prompts are kept; None: nowhere.

    Attributes:
        failure: what made the engine unable to go on; None: nothing yet.
    """

    def __init__(self, engine: Engine, queue: int, cache: PrefixCache | None = None):
        self.engine, self._most_waiting, self._cache = engine, queue, cache
        self.failure: Exception | None = None
        self._waiting: collections.deque[Job] = collections.deque()
        self._writing: dict[OpenSequence, Job] = {}
        self._pending: dict[Job, Drawn] = {}
        self._stops_at: float | None = None  # once it stops: when jobs that still run are ended
        self._changed = threading.Condition()  # of `_waiting`, `_stops_at` and every job's `is_cancelled`
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_handover = self._last_look = 0.0
        self._thread = threading.Thread(target=self._run, name="heron-engine", daemon=True)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_writing(self) -> int:
        return len(self._writing)

    @property
    def is_ready(self) -> bool:
        """Whether a job would be taken."""
        return self.failure is None and self._stops_at is None and self._loop is not None

    def start(self) -> None:
        """Begin, in the event loop that will submit jobs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Take jobs, all of them or none.

        Raises:
            Refusal: too many wait already, the engine has failed, or is being stopped.
        """
        with self._changed:
            if self.failure is not None:
                raise Refusal(503, "the engine has failed; the server's log says why")
            if self._stops_at is not None:
                raise stopping()
            if len(self._waiting) + len(jobs) > self._most_waiting + self.engine.n_free:
                raise too_busy(f"{len(self._waiting)} requests wait already; try again")
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job whose text nobody wants any more, before the next token is drawn."""
        with self._changed:
            job.is_cancelled = True
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """Take no more jobs, finish those that are there within `grace` seconds, fail the others, and end the thread.

        This waits for the thread: call it outside of the event loop. Of several calls the shortest grace counts.
        """
        with self._changed:
            self._stops_at = min(time.monotonic() + grace, math.inf if self._stops_at is None else self._stops_at)
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._drop()
                self._admit()
                if self._writing:
                    self._draw()
            except Exception as error:  # a fault of the device or of ours: no later step can be trusted
                self._fail_all(error)
            self._hand_over()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False: all is done, and more will not come."""
        with self._changed:
            while not (self._waiting or self._writing):
                if self._stops_at is not None:
                    return False
                self._changed.wait()
        return True

    def _drop(self) -> None:
        """End the jobs that are cancelled or whose time is over."""
        now = time.monotonic()
        is_over = self._stops_at is not None and now > self._stops_at
        late = stopping() if is_over else too_slow()
        looks = is_over or now - self._last_look > _SECONDS_BETWEEN_LOOKS
        self._last_look = now if looks else self._last_look

        def ends(job: Job) -> bool:
            return job.is_cancelled or (looks and (is_over or now > job.deadline))

        for sequence, job in [(sequence, job) for sequence, job in self._writing.items() if ends(job)]:
            self._leave(sequence, job)
            self._fail(job, late)
        with self._changed:
            gone = [job for job in self._waiting if ends(job)]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._fail(job, late)

    def _admit(self) -> None:
        """Take places for the jobs that came first."""
        while self.engine.n_free:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                sequence = self.engine.add(self._behind_cache(job))
            except HeronError as error:
                self._fail(job, error)
            else:
                self._writing[sequence] = job

    def _behind_cache(self, job: Job) -> Request:
        """The job's request, less what of its prompt the cache has read."""
        request = job.request
        found = None if self._cache is None else self._cache.find(job.ids[:-1], job.start_key)
        if found is None:
            return request
        snapshot, n = found
        job.n_cached = n
        marks = tuple(mark - n for mark in request.marks if mark > n)
        return dataclasses.replace(request, prompt=job.ids[n:], after=Snapshot(snapshot.state), marks=marks)

    def _draw(self) -> None:
        """Let the engine make a step, and note what it has drawn."""
        for sequence, token in self.engine.step():
            job = self._writing[sequence]
            if isinstance(token, HeronError):
                self._leave(sequence, job)
                is_ours = job.request.constraint is None  # else the grammar that was asked for leads nowhere
                self._fail(job, Refusal(500 if is_ours else 400, str(token)))
                continue
            piece = self._pending.get(job)
            if piece is None:
                piece = self._pending[job] = Drawn()
            job.ids.append(token.id)
            piece.text += sequence.text.push(token.id)
            piece.tokens.append(token)
            piece.finish = sequence.text.finish
            if piece.finish is None and _is_complete(job.request.constraint):
                piece.text += sequence.text.flush()
                piece.finish = "stop"
            if piece.finish is not None:
                self._leave(sequence, job)

    def _leave(self, sequence: OpenSequence, job: Job) -> None:
        """Free a sequence's place; what it has read goes into the cache."""
        del self._writing[sequence]
        if not sequence.is_open:
            return
        if self._cache is not None:
            for mark, snapshot in sequence.snapshots.items():
                self._cache.keep(job.ids[: job.n_cached + mark], snapshot, job.start_key)
        if job.keeps and sequence.is_read:
            job.behind = self.engine.snapshot(sequence)
            if self._cache is not None:  # the last token drawn is pending, and not read
                self._cache.keep(job.ids[: -len(job.behind.pending)], job.behind, job.start_key)
        self.engine.close(sequence)

    def _fail(self, job: Job, error: Exception) -> None:
        self._pending.setdefault(job, Drawn()).error = error

    def _fail_all(self, error: Exception) -> None:
        _log.critical("the engine has failed", exc_info=error)
        self.failure = error
        with self._changed:
            jobs = [*self._writing.values(), *self._waiting]
            self._writing.clear()
            self._waiting.clear()
        for job in jobs:
            self._fail(job, Refusal(500, "the engine has failed; the server's log says why"))

    def _hand_over(self) -> None:
        """Give the loop what was drawn: the first and the last piece of a job now, of the others those that wait most,
        as many as it is time for."""
        now = time.monotonic()
        n_due = max(1, int((now - self._last_handover) / SECONDS_A_STREAM))
        self._last_handover = now
        due = [
            job
            for number, (job, piece) in enumerate(self._pending.items())
            if number < n_due or piece.finish or piece.error or job.n_drawn == len(piece.tokens)
        ]
        if due and self._loop is not None:
            pieces = {job: self._pending.pop(job) for job in due}
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_give, pieces)


def _is_complete(constraint: Constraint | None) -> bool:
    return isinstance(constraint, Grammar) and constraint.is_complete


def _give(pieces: dict[Job, Drawn]) -> None:
    for job, piece in pieces.items():
        job.take(piece)
