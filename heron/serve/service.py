"""What the routes share: the models, what is kept between requests, and how a request becomes jobs of an engine."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from heron.config import LARGEST_SEED
from heron.config.serve import ServeConfig
from heron.data.template import Message, Template
from heron.generation import Request, Sampling
from heron.serve.engines import Engines
from heron.serve.grammar import Grammar, Grammars
from heron.serve.jobs import Job
from heron.serve.metrics import Metrics
from heron.serve.models import Models, Served
from heron.serve.openai import Sampled
from heron.serve.orders import Drawn, Order, Start
from heron.serve.prompts import Prompt
from heron.serve.refusals import Refusal, too_busy
from heron.serve.threads import worked

MOST_CONVERSATIONS = 10_000  # whose messages are kept for previous_response_id and session_id
MOST_CONVERSATION_CHARACTERS = 1 << 26


@dataclasses.dataclass(frozen=True)
class Kept:
    """Where a conversation is, for the requests that go on from it or save it.

    What the model has read of it is in the prefix cache, or is read again. Of a plain text, which has no messages, the
    engines have kept what was read, under the same id.
    """

    model: str
    state: str | None  # the saved state that it began from
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response: str = ""  # the last one, as JSON

    @property
    def n_characters(self) -> int:
        said = sum(len(message.content) + len(message.reasoning) for message in self.messages)
        return said + len(self.response)


class Conversations:
    """What is kept by the id of a session or a response; the oldest are forgotten where there are too many."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._n_characters = 0

    def keep(self, key: str, kept: Kept) -> None:
        """Keep a conversation, in place of an older one of this id."""
        self.forget(key)
        self._kept[key] = kept
        self._n_characters += kept.n_characters
        while len(self._kept) > MOST_CONVERSATIONS or self._n_characters > MOST_CONVERSATION_CHARACTERS:
            self.forget(next(iter(self._kept)))

    def keep_response(self, key: str, response: str) -> None:
        """Keep the response, as JSON, with the conversation that it ends, if that is kept."""
        if (kept := self.find(key)) is not None:
            self.keep(key, dataclasses.replace(kept, response=response))

    def find(self, key: str) -> Kept | None:
        """The conversation of an id, which is then used last; None: there is none, or it was forgotten."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def forget(self, key: str) -> bool:
        """Forget the conversation of an id; False: there was none."""
        kept = self._kept.pop(key, None)
        self._n_characters -= 0 if kept is None else kept.n_characters
        return kept is not None


class Service:
    """A server's models, and what it keeps between requests.

    Attributes:
        config, models, template, metrics: as their classes say.
        link: to the engines, which keep the states.
        conversations: by the id of a session or of a response.
    """

    def __init__(self, config: ServeConfig, models: Models, template: Template):
        self.config, self.models, self.template, self.link = config, models, template, models.link
        self._embeds = asyncio.Semaphore(1)  # one more would only wait for the engine, in a thread
        self._n_embeds = 0  # with those that wait
        self.metrics = Metrics(models)
        self.conversations = Conversations()

    # -- from a request to jobs -----------------------------------------------------------------------------------

    async def start_of(self, served: Served, state: str | None, session: str | None = None) -> Start:
        """What a text begins from: the saved state `state`, else where the session began, else the model's start.

        Raises:
            HeronError: there is no such state, or it is another model's.
        """
        if state is None and session is not None:
            kept = self.conversations.find(session)
            state = kept.state if kept is not None and kept.model == served.name else None
        if state is None:
            return served.start
        return await self.link.ask(Engines.start_at, served.engine, served.name, state)

    async def jobs(
        self,
        served: Served,
        prompt: Prompt,
        start: Start,
        settings: Sampled,
        max_tokens: int,
        usual: Sampling,
        n: int = 1,
        logprobs: int | None = None,
        form: Callable[[Grammars], Grammar] | None = None,
        stop_ids: Sequence[int] = (),
        keeps: bool = False,
        session: str | None = None,
    ) -> list[Job]:
        """Have `n` texts behind the same prompt written.

        Args:
            usual: how tokens are drawn where the request does not say it.
            form: makes the grammar that each must follow.
            keeps: whether the state behind each text is wanted in the prefix cache.
            session: that is at the state behind the first of them then.

        Raises:
            Refusal: too long, too many, or out of range.
            HeronError: what the engine refuses.
        """
        self.check_length(prompt.ids)
        if max_tokens > self.config.max_answer:
            wanted = f"wanted at most {self.config.max_answer} tokens of an answer, got {max_tokens}"
            raise Refusal(400, f"max_tokens: {wanted}", "max_tokens")
        sampling = sampling_of(settings, usual)
        seed = secrets.randbelow(LARGEST_SEED + 1) if settings.seed is None else settings.seed
        request = Request(
            prompt.ids, max_tokens, sampling, (*prompt.stop, *settings.stops), seed, None, stop_ids,
            logit_bias=settings.biases, logprobs=logprobs, marks=(prompt.mark,) if prompt.mark else (),
        )  # fmt: skip
        await worked(len(prompt.ids), served.check, request)
        orders = []
        for number in range(n):
            one = dataclasses.replace(request, seed=(seed + number) % (LARGEST_SEED + 1))
            kept_as = session if number == 0 else None
            orders.append(Order(one, self.config.timeout, start, form, keeps, kept_as))
        return await served.desk.submit(orders)

    def check_length(self, ids: Sequence[int]) -> None:
        """Refusal for a prompt that is too long."""
        if len(ids) > self.config.max_prompt:
            wanted = f"wanted a prompt of at most {self.config.max_prompt} tokens, got {len(ids)}"
            raise Refusal(400, wanted, code="context_length_exceeded")

    async def embedded(self, served: Served, ids: Sequence[int]) -> np.ndarray:
        """(C,) fp32 of length 1: the mean of the model's last hidden states. Refusal where too many wait for theirs."""
        if self._n_embeds > self.config.queue:
            raise too_busy(f"{self._n_embeds} embeddings wait already; try again")
        self._n_embeds += 1
        try:
            async with self._embeds:
                return await self.link.ask(Engines.embed, served.engine, ids)
        finally:
            self._n_embeds -= 1

    async def drawn(self, served: Served, job: Job) -> AsyncGenerator[Drawn]:
        """What is drawn for a job; it is cancelled where nobody takes it any more, and counted at its end."""
        try:
            is_first = True
            async with contextlib.aclosing(job.drawn()) as drawn:
                async for piece in drawn:
                    if is_first:
                        self.metrics.first_token.observe(job.seconds)
                        is_first = False
                    yield piece
        finally:
            served.desk.cancel(job)
            self.metrics.whole.observe(job.seconds)
            self.metrics.prompt_tokens.inc(job.n_prompt)
            self.metrics.cached_tokens.inc(job.n_cached)
            self.metrics.drawn_tokens.inc(job.n_drawn)


def sampling_of(settings: Sampled, usual: Sampling) -> Sampling:
    """How tokens are drawn: what the request says, and where it says nothing, what is usual."""
    given = {
        field.name: value
        for field in dataclasses.fields(Sampling)
        if (value := getattr(settings, field.name, None)) is not None
    }
    return dataclasses.replace(usual, **given)
