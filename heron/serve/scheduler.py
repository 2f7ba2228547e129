"""One thread runs an engine: requests join in order of arrival, leave when they end, and their texts go to the loop.

The thread and the event loop of the server share Python's lock, so what is drawn is handed over for many streams at
once, and less often the more there are: see `SECONDS_A_STREAM`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncGenerator, Callable

from heron.errors import HeronError
from heron.generation import Engine, OpenSequence, Request, Snapshot, Token
from heron.serve.refusals import Refusal, stopping, too_busy
from heron.serve.sessions import PrefixCache

SECONDS_A_STREAM = 2e-4  # between two handovers, times the number of streams; a tenth of that is what one costs
_LONGEST_BETWEEN = 0.05
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
        self.ids, self.n_prompt, self.n_cached = list(request.prompt), len(request.prompt), 0
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
        on_step: called in the thread with the number of tokens drawn, after each step.

    Attributes:
        failure: what made the engine unable to go on; None: nothing yet.
    """

    def __init__(
        self,
        engine: Engine,
        queue: int,
        cache: PrefixCache | None = None,
        on_step: Callable[[int], None] = lambda n: None,
    ):
        self.engine, self.failure = engine, None
        self._most_waiting, self._cache, self._on_step = queue, cache, on_step
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

        This waits for the thread: call it outside of the event loop.
        """
        with self._changed:
            self._stops_at = time.monotonic() + grace
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._drop()
                self._admit()
                self._draw()
            except HeronError as error:
                self._fail_broken(error)
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
        if is_over := self._stops_at is not None and now > self._stops_at:
            late = stopping()
        else:
            late = Refusal(408, "the request took longer than the server allows", code="timeout")
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
        drawn = self.engine.step()
        self._on_step(len(drawn))
        for sequence, token in drawn:
            job = self._writing[sequence]
            piece = self._pending.get(job)
            if piece is None:
                piece = self._pending[job] = Drawn()
            job.ids.append(token.id)
            piece.text += sequence.text.push(token.id)
            piece.tokens.append(token)
            constraint = job.request.constraint
            finish = sequence.text.finish or ("stop" if constraint is not None and constraint.is_complete else None)
            if finish is not None:
                piece.text += "" if sequence.text.finish else sequence.text.flush()
                piece.finish = finish
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

    def _fail_broken(self, error: HeronError) -> None:
        """Fail the jobs whose sequences the engine has closed; where it closed none, all."""
        broken = [one for one in self._writing if not one.is_open] or list(self._writing)
        for sequence in broken:
            job = self._writing[sequence]
            self._leave(sequence, job)
            self._fail(job, Refusal(500, str(error)))

    def _fail_all(self, error: Exception) -> None:
        self.failure = error
        with self._changed:
            jobs = [*self._writing.values(), *self._waiting]
            self._writing.clear()
            self._waiting.clear()
        for job in jobs:
            self._fail(job, Refusal(500, "the engine has failed; the server's log says why"))

    def _hand_over(self) -> None:
        """Give the loop what was drawn: the first and the last piece of a job now, others once it is their time."""
        now = time.monotonic()
        wait = min(_LONGEST_BETWEEN, SECONDS_A_STREAM * len(self._writing))
        if now - self._last_handover >= wait:
            self._last_handover = now
            pieces = self._pending
            self._pending = {}
        else:
            urgent = [
                job
                for job, piece in self._pending.items()
                if piece.finish or piece.error or job.n_drawn == len(piece.tokens)
            ]
            pieces = {job: self._pending.pop(job) for job in urgent}
        if pieces and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_give, pieces)


def _give(pieces: dict[Job, Drawn]) -> None:
    for job, piece in pieces.items():
        job.take(piece)
