"""The thread that runs an engine, and the desk before it: who is served when, and what ends a job."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading

import pytest
import torch

from heron import tokenizer
from heron.config.serve import ServeConfig
from heron.errors import HeronError
from heron.generation import Engine, Request, Sampling
from heron.serve import jobs
from heron.serve.engines import Engines
from heron.serve.jobs import Desk
from heron.serve.link import Direct
from heron.serve.models import Models
from heron.serve.orders import Drawn, Order, Start
from heron.serve.prefix_cache import PrefixCache
from heron.serve.refusals import Refusal
from heron.serve.scheduler import Scheduler
from heron.serve.sessions import StateStore
from heron.serve.turns import AT_ONCE, Turns
from tests.generation import accuracy
from tests.generation.recording import engine_as_on_a_gpu

ANY = Sampling(top_p=1.0)


def running(engine, work, queue=100):
    """What `work`, a coroutine of models and the desk of their one engine, gives; they are stopped behind it."""

    async def main():
        engines = Engines(ServeConfig(name="tiny"), engine, {}, {})
        models = Models(engines.offers, queue, Direct(engines))
        models.start()
        try:
            return await asyncio.wait_for(work(models, models.desks["tiny"]), 30)
        finally:
            await models.stop(0)

    return asyncio.run(main())


def order_of(prompt=(1, 2, 3), n=5, seed=0, timeout=60.0, form=None):
    """An order that no end of a document cuts short."""
    request = Request(list(prompt), n, ANY, seed=seed, logit_bias={0: -100}, logprobs=0)
    return Order(request, timeout, form=form)


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
    requests = [Request([3, n + 1] * (n % 5 + 1), 3 + n % 7, ANY, seed=n, logprobs=0) for n in range(40)]

    async def work(models, desk):
        jobs = [job for request in requests for job in await desk.submit([Order(request, 60)])]
        return await asyncio.gather(*map(ids_of, jobs))

    engine = engine_of(1)
    assert running(engine_of(8), work) == [alone(engine, request) for request in requests]


def test_what_is_kept_behind_texts_is_the_same_where_the_engine_looks_ahead(random_model):
    """Texts join and end at their limit or a stop text, while a step beyond their last token has begun."""
    model, requests, told = random_model(vocab_size=256).double(), [], []
    for n in range(9):
        stop = tuple(map(chr, range(32, 127))) if n % 3 else ()
        requests.append(Request([n + 1, 2], 3 + 2 * (n % 4), ANY, stop, n, logit_bias={0: -100}))
    for looks_ahead in (True, False):
        engine = engine_as_on_a_gpu(model, tokenizer.load("bytes"), 3, looks_ahead=looks_ahead)
        cache, states, texts = PrefixCache(1 << 30, 1 << 30), StateStore(None, 1 << 30), {}
        orders = [
            Order(dataclasses.replace(request, logprobs=0), 60, Start("base"), keeps=True, session=str(n))
            for n, request in enumerate(requests)
        ]
        for order in orders:
            texts[order.number] = []
        scheduler = Scheduler(engine, cache, states)
        scheduler.start(lambda drawn, texts=texts: [texts[piece.number].extend(piece.tokens) for piece in drawn])
        scheduler.submit(*orders)
        scheduler.stop(30)
        said = [[token.id for token in tokens] for tokens in texts.values()]
        kept = [states.find(order.session) for order in orders]
        found = [cache.find([n + 1, 2, *ids], "base") for n, ids in enumerate(said)]
        told.append((said, kept, found))
    (said, kept, found), (true_said, true_kept, true_found) = told
    assert said == true_said
    assert [n for _, n in found] == [n for _, n in true_found] == [1 + len(ids) for ids in said]
    pairs = [*zip(kept, true_kept, strict=True), *zip((s for s, _ in found), (s for s, _ in true_found), strict=True)]
    for mine, true in pairs:
        assert mine.pending == true.pending
        for part, want in zip(mine.state.to_list(), true.state.to_list(), strict=True):
            assert accuracy.distance(part, want) < 1e-12


def test_what_comes_while_a_piece_is_used_is_one_piece(engine_of):
    order = order_of(n=50)

    async def work(models, desk):
        [job] = await desk.submit([order])
        while not job.is_over:
            await asyncio.sleep(0.001)
        [piece] = [piece async for piece in job.drawn()]
        return piece

    piece = running(engine_of(1), work)
    assert (piece.n, piece.finish) == (50, "length")
    assert [token.id for token in piece.tokens] == alone(engine_of(1), order.request)
    assert piece.text == "".join(engine_of(1).stream(order.request))


def test_many_jobs_get_several_tokens_at_once(monkeypatch):
    monkeypatch.setattr(jobs, "SECONDS_A_PIECE", 1e-3)  # a rest lasts longer than all that follows, on any machine

    async def main():
        class Engine:
            def tell(self, *_):
                pass

        desk = Desk("tiny", 100, 0, Engine())
        desk.open()
        submitted = await desk.submit([order_of() for _ in range(100)])

        def draw(n):
            desk.take([Drawn(job.number, str(n % 10), 1, finish=None if n else "length") for job in submitted])
            if n:
                asyncio.get_running_loop().call_soon(draw, n - 1)

        async def read(job):
            return [piece.text async for piece in job.drawn()]

        draw(29)
        return await asyncio.gather(*map(read, submitted))

    for pieces in asyncio.run(main()):
        assert "".join(pieces) == "9876543210" * 3
        assert len(pieces) < 20


def test_requests_that_come_at_once_begin_a_few_in_each_turn_of_the_loop():
    async def main():
        turns, now, begun = Turns(), [0], []

        def count():
            now[0] += 1
            asyncio.get_running_loop().call_soon(count)

        async def come(number):
            await turns.wait()
            begun.append((number, now[0]))

        count()
        for _ in range(2):
            await asyncio.gather(*map(come, range(50)))
        return begun

    begun = asyncio.run(main())
    assert [number for number, _ in begun] == [*range(50)] * 2
    assert set(collections.Counter(turn for _, turn in begun).values()) == {AT_ONCE, 50 % AT_ONCE}


def test_who_came_first_is_served_first(engine_of):
    async def work(models, desk):
        order = []

        async def note(number, job):
            await ids_of(job)
            order.append(number)

        jobs = await desk.submit([order_of(n=2) for _ in range(6)])
        await asyncio.gather(*(note(number, job) for number, job in enumerate(jobs)))
        return order

    assert running(engine_of(1), work) == list(range(6))


def test_more_than_may_wait_are_refused_together(engine_of):
    async def work(models, desk):
        [first] = await desk.submit([order_of(n=10_000)])
        await anext(first.drawn())
        await desk.submit([order_of(), order_of()])
        with pytest.raises(Refusal) as caught:
            await desk.submit([order_of()])
        assert (caught.value.status, caught.value.retry_after) == (429, 1)
        assert (desk.n_waiting, desk.n_writing) == (2, 1)

    running(engine_of(1), work, queue=2)


def test_a_text_that_nobody_waits_for_ends_though_its_grammar_is_still_made(engine_of):
    begun, goes_on, made = threading.Event(), threading.Event(), threading.Event()

    def form(grammars):
        begun.set()
        goes_on.wait(20)
        made.set()

    async def work(models, desk):
        asked = asyncio.create_task(desk.submit([order_of(n=1_000_000_000, form=form)]))
        await asyncio.to_thread(begun.wait, 20)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert desk.n_writing == 1  # its place is taken until it is known to have ended
        goes_on.set()
        await asyncio.to_thread(made.wait, 20)
        [job] = await desk.submit([order_of(n=2)])  # there is one place
        await ids_of(job)
        assert (desk.n_writing, desk.n_waiting) == (0, 0)

    running(engine_of(1), work)


@pytest.mark.parametrize("waits", [False, True])
def test_a_job_whose_time_is_over_fails(engine_of, waits):
    async def work(models, desk):
        [first] = await desk.submit([order_of(n=100_000, timeout=60.0 if waits else 0.1)])
        [late] = await desk.submit([order_of(n=100_000, timeout=0.1)]) if waits else [first]
        with pytest.raises(Refusal) as caught:
            await ids_of(late)
        assert caught.value.status == 408
        assert late.is_over

    running(engine_of(1), work)


def test_a_cancelled_job_draws_at_most_one_token_more(engine_of, monkeypatch):
    engine, steps, allowed = engine_of(1), [], threading.Semaphore(3)
    step = Engine.step

    def counted(engine):
        assert allowed.acquire(timeout=10)
        steps.append(None)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)

    async def work(models, desk):
        [job] = await desk.submit([order_of(n=1000)])
        while len(steps) < 3:
            await asyncio.sleep(0.001)
        desk.cancel(job)
        allowed.release(100)
        with pytest.raises(Refusal):
            await ids_of(job)
        assert engine.n_free == 1
        assert desk.n_writing == 0
        return len(steps)

    assert running(engine, work) <= 4


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

    async def work(models, desk):
        [bad] = await desk.submit([order_of(n=20, form=lambda grammars: Bad())])
        [good] = await desk.submit([order_of(n=20)])
        with pytest.raises(Refusal, match="enough") as caught:
            await ids_of(bad)
        assert caught.value.status == 400
        return await ids_of(good)

    assert len(running(engine_of(2), work)) == 20


def test_orders_of_which_one_cannot_be_made_take_no_place(engine_of):
    def impossible(grammars):
        raise Refusal(400, "no such form")

    async def work(models, desk):
        with pytest.raises(Refusal, match="no such form"):
            await desk.submit([order_of(), order_of(form=impossible)])
        assert desk.n_writing == 0
        jobs = await desk.submit([order_of(n=20), order_of(n=20)])
        return await asyncio.gather(*map(ids_of, jobs))

    assert [len(ids) for ids in running(engine_of(1), work, queue=1)] == [20, 20]


def test_an_engine_that_breaks_fails_all_and_takes_no_more(engine_of, monkeypatch, caplog):
    async def work(models, desk):
        jobs = await desk.submit([order_of(n=10_000), order_of()])
        await anext(jobs[0].drawn())
        monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
        for job in jobs:
            with pytest.raises(Refusal, match="the engine has failed") as caught:
                await ids_of(job)
            assert caught.value.status == 500
        with pytest.raises(Refusal) as caught:
            await desk.submit([order_of()])
        assert caught.value.status == 503
        assert models.has_failed
        assert not models.are_ready

    running(engine_of(1), work)
    assert "division by zero" in caplog.text


@pytest.mark.parametrize("at", ["add", "close"])
def test_an_engine_that_breaks_as_a_text_joins_or_leaves_fails_that_text_too(engine_of, monkeypatch, caplog, at):
    async def work(models, desk):
        monkeypatch.setattr(Engine, at, lambda engine, _: 1 / 0)
        jobs = await desk.submit([order_of(), order_of()])
        for job in jobs:
            with pytest.raises(Refusal, match="the engine has failed"):
                await ids_of(job)

    running(engine_of(1), work)
    assert "division by zero" in caplog.text


def test_stopping_finishes_what_runs_and_takes_no_more(engine_of):
    async def work(models, desk):
        [job] = await desk.submit([order_of(n=200)])
        await anext(job.drawn())
        stopped = asyncio.create_task(models.stop(20))
        while models.are_ready:
            await asyncio.sleep(0.001)
        with pytest.raises(Refusal) as caught:
            await desk.submit([order_of()])
        assert caught.value.status == 503
        await ids_of(job)
        await stopped
        return job.n_drawn

    assert running(engine_of(1), work) == 200


def test_stopping_without_grace_ends_what_runs(engine_of):
    async def work(models, desk):
        [job] = await desk.submit([order_of(n=100_000)])
        await anext(job.drawn())
        await models.stop(0)
        with contextlib.suppress(StopAsyncIteration), pytest.raises(Refusal, match="stopping"):
            await ids_of(job)

    running(engine_of(1), work)


def test_of_two_stops_the_shorter_grace_counts(engine_of):
    async def work(models, desk):
        [job] = await desk.submit([order_of(n=100_000)])
        await anext(job.drawn())
        first = asyncio.create_task(models.stop(1000))
        while models.are_ready:
            await asyncio.sleep(0.001)
        await models.stop(0)
        await first
        with pytest.raises(Refusal, match="stopping"):
            await ids_of(job)

    running(engine_of(1), work)


def test_an_order_that_comes_behind_the_end_is_told(engine_of):
    async def work(models, desk):
        await models.stop(0)
        desk.open()
        [job] = await desk.submit([order_of()])
        with pytest.raises(Refusal, match="stopping"):
            await ids_of(job)

    running(engine_of(1), work)
