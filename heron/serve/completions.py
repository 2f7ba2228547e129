"""/v1/completions: texts that go on behind prompts, whole or as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from heron.generation import Sampling, Token
from heron.serve import chat, wire
from heron.serve.jobs import Job
from heron.serve.models import Served
from heron.serve.openai import CompletionRequest
from heron.serve.orders import Drawn, Start
from heron.serve.prompts import Prompt
from heron.serve.refusals import Refusal
from heron.serve.service import Kept, Service
from heron.serve.threads import worked
from heron.tokenizer.continuation import encode_behind

USUAL = Sampling()  # as heron generate
USUAL_TOKENS = 16  # as OpenAI


@dataclasses.dataclass
class Continuation:
    """One text, as far as it has come."""

    number: int
    job: Job
    prompt: str
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def take(self, drawn: Drawn) -> None:
        self.text += drawn.text
        self.tokens += drawn.tokens
        self.finish = None if drawn.finish is None else wire.FINISH[drawn.finish]


@dataclasses.dataclass
class Asked:
    """Prompts that are being continued."""

    service: Service
    served: Served
    start: Start
    texts: list[Continuation]
    n: int  # of them to each prompt
    n_prompt: int  # tokens of all prompts
    session: str | None
    id: str
    created: int

    async def drawn(self, text: Continuation) -> AsyncGenerator[Drawn]:
        """What is drawn for one text; at its end the session is kept."""
        try:
            async with contextlib.aclosing(self.service.drawn(self.served, text.job)) as drawn:
                async for piece in drawn:
                    yield piece
        finally:
            if self.session is not None and text.number == 0 and text.job.is_over and text.job.n_drawn:
                self.service.conversations.keep(self.session, Kept(self.served.name, self.start.state))

    def cancel(self) -> None:
        for text in self.texts:
            self.served.desk.cancel(text.job)

    @property
    def usage(self) -> dict[str, Any]:
        n_drawn = sum(text.job.n_drawn for text in self.texts)
        return wire.usage(self.n_prompt, n_drawn, sum(text.job.n_cached for text in self.texts[:: self.n]))

    def answer(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An answer or a piece of one."""
        about = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}
        return {**about, "choices": choices}


async def ask(service: Service, body: CompletionRequest) -> Asked:
    """Have the texts written. Refusal, or another HeronError, for what cannot be."""
    served = service.models.get(body.model)
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise Refusal(400, f"best_of: wanted the number of texts, n = {n}, got {body.best_of}", "best_of")
    if body.max_tokens == 0:
        raise Refusal(400, "max_tokens: wanted at least 1, got 0", "max_tokens")
    start = await service.start_of(served, body.state, body.session_id)
    texts, n_prompt, prompts = [], 0, body.prompts
    if len(prompts) * n > chat.MOST_AT_ONCE:
        raise Refusal(400, f"prompt: wanted at most {chat.MOST_AT_ONCE} texts of a request, got {len(prompts) * n}")
    try:
        for prompt in prompts:
            ids = await worked(len(prompt), _ids, served, prompt, start)
            shown = prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)
            most = USUAL_TOKENS if body.max_tokens is None else body.max_tokens
            jobs = await service.jobs(
                served, Prompt(ids, 0, "", ()), start, body, most, USUAL, n, body.logprobs,
                stop_ids=body.stop_ids or (), keeps=body.session_id is not None,
                session=None if texts else body.session_id,
            )  # fmt: skip
            n_prompt += len(ids)
            texts += [Continuation(len(texts) + i, job, shown if body.echo else "") for i, job in enumerate(jobs)]
    except BaseException:
        for text in texts:
            served.desk.cancel(text.job)
        raise
    return Asked(service, served, start, texts, n, n_prompt, body.session_id, wire.new_id("cmpl-"), int(time.time()))


def _ids(served: Served, prompt: str | list[int], start: Start) -> list[int]:
    """What is read for a prompt, the ids pending at its start first."""
    if start.pending is None:
        return served.prompt_ids(prompt)
    new = encode_behind(served.tokenizer, start.pending, prompt) if isinstance(prompt, str) else prompt
    return served.prompt_ids([*start.pending, *new])


async def whole(asked: Asked, with_logprobs: bool) -> dict[str, Any]:
    """All texts, once they are written."""

    async def read(text: Continuation) -> None:
        async for piece in asked.drawn(text):
            text.take(piece)

    await chat.gathered(asked.cancel, [read(text) for text in asked.texts])
    choices = []
    for text in asked.texts:
        scores = _scores(text.tokens, asked.served, len(text.prompt)) if with_logprobs else None
        choices.append(_choice(text, text.prompt + text.text, scores, text.finish))
    return {**asked.answer(choices), "usage": asked.usage}


async def stream(asked: Asked, with_logprobs: bool, with_usage: bool) -> AsyncGenerator[bytes]:
    """Server-sent events: the texts in pieces, to [DONE]."""
    opened = wire.event(asked.answer([]))[: -len(b"]}\n\n")]
    for text in asked.texts:
        if text.prompt:
            yield wire.event(asked.answer([_choice(text, text.prompt, None, None)]))
    async with contextlib.aclosing(chat.together(asked.texts, asked.drawn)) as drawn:
        async for text, piece in drawn:
            scores = _scores(piece.tokens, asked.served, len(text.prompt) + len(text.text)) if with_logprobs else None
            text.take(piece)
            if scores is None and piece.finish is None:  # by far the most frequent
                yield b'%b{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}]}\n\n' % (
                    opened, text.number, wire.quoted(piece.text).encode(),
                )  # fmt: skip
            else:
                yield wire.event(asked.answer([_choice(text, piece.text, scores, text.finish)]))
    last = wire.event({**asked.answer([]), "usage": asked.usage}) if with_usage else b""
    yield last + wire.DONE


def _choice(text: Continuation, shown: str, scores: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": text.number, "text": shown, "logprobs": scores, "finish_reason": finish}


def _scores(tokens: Sequence[Token], served: Served, offset: int) -> dict[str, Any]:
    """Tokens with their log-probabilities, as completions list them; `offset`: characters before them."""
    scored, offsets = wire.scored(tokens, served.tokenizer), []
    for one in scored:
        offsets.append(offset)
        offset += len(one["token"])
    return {
        "tokens": [one["token"] for one in scored],
        "token_logprobs": [one["logprob"] for one in scored],
        "top_logprobs": [{other["token"]: other["logprob"] for other in one["top_logprobs"]} for one in scored],
        "text_offset": offsets,
    }
