"""The thread that runs an engine: who is served when, and what ends a job."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch

from heron.errors import HeronError
from heron.generation import Engine, Request, Sampling
from heron.serve.refusals import Refusal
from heron.serve.scheduler import Job, Scheduler

ANY = Sampling(top_p=1.0)


def running(engine, work, queue=100, **settings):
    """What `work`, a coroutine of a scheduler, gives; the scheduler is stopped behind it."""

    async def main():
        scheduler = Scheduler(engine, queue, **settings)
        scheduler.start()
        try:
            return await asyncio.wait_for(work(scheduler), 30)
        finally:
            await asyncio.to_thread(scheduler.stop, 0)

    return asyncio.run(main())


def job_of(prompt=(1, 2, 3), n=5, seed=0, timeout=60.0, **changes):
    """A job that no end of a document cuts short."""
    return Job(Request(list(prompt), n, ANY, seed=seed, logit_bias={0: -100}, **changes), timeout)


async def ids_of(job):
    found = []
    async for piece in job.drawn():
        found += [token.id for token in piece.tokens]
    return found


def alone(engine, request):
    sequence, found = engine.add(request), []
    while len(found) < request.max_tokens:
        found += [token.id for _, token in engine.step()]
    engine.close(sequence)
    return found


def test_jobs_say_what_the_engine_says_alone(engine_of):
    requests = [Request([3, n + 1] * (n % 5 + 1), 3 + n % 7, ANY, seed=n) for n in range(40)]

    async def work(scheduler):
        jobs = [Job(request, 60) for request in requests]
        for job in jobs:
            scheduler.submit(job)
        return await asyncio.gather(*map(ids_of, jobs))

    engine = engine_of(1)
    assert running(engine_of(8), work) == [alone(engine, request) for request in requests]


def test_who_came_first_is_served_first(engine_of):
    async def work(scheduler):
        order, jobs = [], [job_of(n=2) for _ in range(6)]

        async def note(number, job):
            await ids_of(job)
            order.append(number)

        scheduler.submit(*jobs)
        await asyncio.gather(*(note(number, job) for number, job in enumerate(jobs)))
        return order

    assert running(engine_of(1), work) == list(range(6))


def test_more_than_may_wait_are_refused_together(engine_of):
    async def work(scheduler):
        first = job_of(n=10_000)
        scheduler.submit(first)
        await anext(first.drawn())
        scheduler.submit(job_of(), job_of())
        with pytest.raises(Refusal) as caught:
            scheduler.submit(job_of())
        assert (caught.value.status, caught.value.retry_after) == (429, 1)
        assert scheduler.n_waiting == 2

    running(engine_of(1), work, queue=2)


@pytest.mark.parametrize("waits", [False, True])
def test_a_job_whose_time_is_over_fails(engine_of, waits):
    async def work(scheduler):
        first = job_of(n=100_000, timeout=60.0 if waits else 0.1)
        late = job_of(n=100_000, timeout=0.1) if waits else first
        scheduler.submit(first)
        if waits:
            scheduler.submit(late)
        with pytest.raises(Refusal) as caught:
            await ids_of(late)
        assert caught.value.status == 408

    running(engine_of(1), work)


def test_a_cancelled_job_draws_at_most_one_token_more(engine_of, monkeypatch):
    steps, allowed = [], threading.Semaphore(3)
    step = Engine.step

    def counted(engine):
        assert allowed.acquire(timeout=10)
        steps.append(None)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)

    async def work(scheduler):
        job = job_of(n=1000)
        scheduler.submit(job)
        while len(steps) < 3:
            await asyncio.sleep(0.001)
        scheduler.cancel(job)
        allowed.release(100)
        with pytest.raises(Refusal):
            await ids_of(job)
        assert scheduler.engine.n_free == 1
        return len(steps)

    assert running(engine_of(1), work) <= 4


def test_a_job_that_fails_ends_alone(engine_of):
    class Bad:
        is_over = False
        n = 0

        def allowed(self):
            self.n += 1
            if self.n > 3:
                raise HeronError("enough")
            return torch.ones(256, dtype=torch.bool)

        def accept(self, token):
            pass

    async def work(scheduler):
        bad, good = job_of(n=20, constraint=Bad()), job_of(n=20)
        scheduler.submit(bad, good)
        with pytest.raises(Refusal, match="enough") as caught:
            await ids_of(bad)
        assert caught.value.status == 400
        return await ids_of(good)

    assert len(running(engine_of(2), work)) == 20


def test_an_engine_that_breaks_fails_all_and_takes_no_more(engine_of, monkeypatch, caplog):
    async def work(scheduler):
        jobs = [job_of(n=10_000), job_of()]
        scheduler.submit(*jobs)
        await anext(jobs[0].drawn())
        monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
        for job in jobs:
            with pytest.raises(Refusal, match="the engine has failed") as caught:
                await ids_of(job)
            assert caught.value.status == 500
        with pytest.raises(Refusal) as caught:
            scheduler.submit(job_of())
        assert caught.value.status == 503
        assert not scheduler.is_ready

    running(engine_of(1), work)
    assert "division by zero" in caplog.text


def test_stopping_finishes_what_runs_and_takes_no_more(engine_of):
    async def work(scheduler):
        job = job_of(n=200)
        scheduler.submit(job)
        await anext(job.drawn())
        stopped = asyncio.create_task(asyncio.to_thread(scheduler.stop, 20))
        await asyncio.sleep(0)
        while scheduler.is_ready:
            await asyncio.sleep(0.001)
        with pytest.raises(Refusal) as caught:
            scheduler.submit(job_of())
        assert caught.value.status == 503
        await ids_of(job)
        await stopped
        return job.n_drawn

    assert running(engine_of(1), work) == 200


def test_stopping_without_grace_ends_what_runs(engine_of):
    async def work(scheduler):
        job = job_of(n=100_000)
        scheduler.submit(job)
        await anext(job.drawn())
        await asyncio.to_thread(scheduler.stop, 0)
        with contextlib.suppress(StopAsyncIteration), pytest.raises(Refusal, match="stopping"):
            await ids_of(job)

    running(engine_of(1), work)


def test_of_two_stops_the_shorter_grace_counts(engine_of):
    async def work(scheduler):
        job = job_of(n=100_000)
        scheduler.submit(job)
        await anext(job.drawn())
        first = asyncio.create_task(asyncio.to_thread(scheduler.stop, 1000))
        while scheduler.is_ready:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(scheduler.stop, 0)
        await first
        with pytest.raises(Refusal, match="stopping"):
            await ids_of(job)

    running(engine_of(1), work)
