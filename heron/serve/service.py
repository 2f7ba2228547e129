"""What the routes share: the models, what is kept between requests, and how a request becomes jobs of an engine."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from torch import Tensor

from heron.config import LARGEST_SEED
from heron.config.serve import ServeConfig
from heron.data.template import Message, Template
from heron.generation import Request, Sampling, Snapshot
from heron.serve.grammar import Grammar
from heron.serve.metrics import Metrics
from heron.serve.models import Models, Served
from heron.serve.openai import Sampled
from heron.serve.prompts import Prompt
from heron.serve.refusals import Refusal
from heron.serve.scheduler import Drawn, Job
from heron.serve.sessions import PrefixCache, StateStore
from heron.serve.threads import worked

MOST_CONVERSATIONS = 10_000  # whose messages are kept for previous_response_id and session_id
MOST_CONVERSATION_CHARACTERS = 1 << 26


@dataclasses.dataclass(frozen=True)
class Start:
    """What a text begins from: nothing, a tuned state or a saved one."""

    snapshot: Snapshot | None = None
    key: str = ""  # in the prefix cache
    state: str | None = None  # the saved one's name


@dataclasses.dataclass(frozen=True)
class Kept:
    """Where a conversation is, for the requests that go on from it or save it.

    What the model has read of it is in the prefix cache, or is read again. Of a plain text, which has no messages, the
    states of the service have what was read, under the same id.
    """

    model: str
    state: str | None  # the saved state that it began from
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def n_characters(self) -> int:
        return sum(len(message.content) + len(message.reasoning) for message in self.messages)


class Conversations:
    """What is kept by the id of a session or a response; the oldest are forgotten where there are too many."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._n_characters = 0

    def keep(self, key: str, kept: Kept) -> None:
        self.forget(key)
        self._kept[key] = kept
        self._n_characters += kept.n_characters
        while len(self._kept) > MOST_CONVERSATIONS or self._n_characters > MOST_CONVERSATION_CHARACTERS:
            self.forget(next(iter(self._kept)))

    def find(self, key: str) -> Kept | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def forget(self, key: str) -> bool:
        kept = self._kept.pop(key, None)
        self._n_characters -= 0 if kept is None else kept.n_characters
        return kept is not None


class Service:
    """A server's models and memory.

    Attributes:
        config, models, template, metrics: as their classes say.
        conversations: by the id of a session or of a response.
        states: saved under names.
        cache: of states of prompts; None: none.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Models,
        template: Template,
        states: StateStore,
        cache: PrefixCache | None,
    ):
        self.config, self.models, self.template, self.states, self.cache = config, models, template, states, cache
        self._embeds = asyncio.Semaphore(1)  # one more would only wait for the engine, in a thread
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
            return Start(served.start, served.name)
        key = f"{served.name}\n{state}\n{self.states.version(state)}"
        return Start(await asyncio.to_thread(self.states.load, state, served.engine), key, state)

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
        constraints: Sequence[Grammar] = (),
        stop_ids: Sequence[int] = (),
        keeps: bool = False,
    ) -> list[Job]:
        """Hand `n` jobs with the same prompt to the model's scheduler.

        Args:
            usual: how tokens are drawn where the request does not say it.
            keeps: whether the state behind each text is wanted.

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
        after = None if start.snapshot is None else Snapshot(start.snapshot.state)  # ids pending there are the prompt's
        request = Request(
            prompt.ids, max_tokens, sampling, (*prompt.stop, *settings.stops), seed, after, stop_ids,
            logit_bias=settings.biases, logprobs=logprobs, marks=(prompt.mark,) if prompt.mark else (),
        )  # fmt: skip
        await worked(len(prompt.ids), served.engine.check, request)
        jobs = []
        for number in range(n):
            one = dataclasses.replace(
                request,
                seed=(seed + number) % (LARGEST_SEED + 1),
                constraint=constraints[number] if constraints else None,
            )
            jobs.append(Job(one, self.config.timeout, start.key, keeps))
        served.scheduler.submit(*jobs)
        return jobs

    def check_length(self, ids: Sequence[int]) -> None:
        """Refusal for a prompt that is too long."""
        if len(ids) > self.config.max_prompt:
            wanted = f"wanted a prompt of at most {self.config.max_prompt} tokens, got {len(ids)}"
            raise Refusal(400, wanted, code="context_length_exceeded")

    async def embedded(self, served: Served, ids: Sequence[int]) -> Tensor:
        """(C,) fp32 of length 1: the mean of the model's last hidden states."""
        async with self._embeds:
            return await asyncio.to_thread(served.engine.embed, ids)

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
            served.scheduler.cancel(job)
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
