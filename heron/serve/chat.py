"""/v1/chat/completions: answers to a conversation, whole or as they come."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from heron.data.template import Message
from heron.generation import Sampling, Token
from heron.serve import wire
from heron.serve.grammar import Grammar, Grammars
from heron.serve.jobs import Job
from heron.serve.models import Served
from heron.serve.openai import ChatRequest, JsonSchema, called, think_of
from heron.serve.orders import Drawn, Start
from heron.serve.parts import Call, Part, Parts
from heron.serve.prompts import prompt_of
from heron.serve.refusals import Refusal
from heron.serve.service import Kept, Service, sampling_of
from heron.serve.threads import worked

USUAL = Sampling(top_p=0.3, presence_penalty=0.3, frequency_penalty=0.3)  # as heron chat
USUAL_TOKENS = 4096
MOST_AT_ONCE = 256  # texts of one request


@dataclasses.dataclass
class Answer:
    """One answer, as far as it has come."""

    number: int
    job: Job
    parts: Parts
    reasoning: str = ""
    content: str = ""
    calls: list[Call] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def take(self, drawn: Drawn) -> list[Part]:
        """Note what was drawn, and give the parts of it."""
        # Where the document ends, what was held back as the beginning of a stop text ends the turn: an empty line.
        parts = self.parts.push(drawn.text.rstrip("\n") if drawn.finish == "end" else drawn.text)
        if drawn.finish is not None:
            parts += self.parts.flush()
        for part in parts:
            self.reasoning += part.reasoning
            self.content += part.content
            if part.call is not None:
                self.calls.append(part.call)
        self.tokens += drawn.tokens
        if drawn.finish is not None:
            self.finish = "tool_calls" if self.calls else wire.FINISH[drawn.finish]
        return parts

    @property
    def message(self) -> Message:
        """As the template has it in a conversation that goes on. Its thought is left out, as clients leave it out."""
        return Message("assistant", self.content, "", tuple(called(*call) for call in self.calls))


@dataclasses.dataclass
class Asked:
    """A conversation that is being answered."""

    service: Service
    served: Served
    start: Start
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    sampling: Sampling
    answers: list[Answer]
    id: str
    created: int
    keep_as: str | None  # the id under which the conversation is kept

    async def drawn(self, answer: Answer) -> AsyncGenerator[Drawn]:
        """What is drawn for one answer, taken note of; at its end the conversation is kept."""
        try:
            async with contextlib.aclosing(self.service.drawn(self.served, answer.job)) as drawn:
                async for piece in drawn:
                    yield piece
        finally:
            if self.keep_as is not None and answer.number == 0:
                said = (*self.messages, answer.message)
                kept = Kept(self.served.name, self.start.state, said, self.tools)
                self.service.conversations.keep(self.keep_as, kept)

    def cancel(self) -> None:
        for answer in self.answers:
            self.served.desk.cancel(answer.job)

    @property
    def usage(self) -> dict[str, Any]:
        first = self.answers[0].job
        return wire.usage(first.n_prompt, sum(answer.job.n_drawn for answer in self.answers), first.n_cached)


async def ask(service: Service, body: ChatRequest) -> Asked:
    """Have the answers written. Refusal, or another HeronError, for what cannot be."""
    served = service.models.get(body.model)
    messages = body.conversation
    tools = () if body.tool_choice == "none" else tuple(tool.function.as_dict for tool in body.tools or ())
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs: give logprobs true with it", "top_logprobs")
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_schema" and (wanted.json_schema is None):
        raise Refusal(400, "response_format: json_schema is missing", "response_format")
    schema = None if wanted is None else wanted.json_schema
    return await answer(
        service, served, await service.start_of(served, body.state, body.session_id), messages, tools,
        settings=body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        think=think_of(body.reasoning_effort, body.think),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        form=None if wanted is None or wanted.type == "text" else (wanted.type, schema),
        forced=body.forced,
        n=body.n or 1,
        keep_as=body.session_id,
        prefix="chatcmpl-",
    )  # fmt: skip


async def answer(
    service: Service,
    served: Served,
    start: Start,
    messages: tuple[Message, ...],
    tools: tuple[Mapping[str, Any], ...],
    settings: Any,
    max_tokens: int | None,
    think: str,
    logprobs: int | None,
    form: tuple[str, JsonSchema | None] | None,
    forced: str | None,
    n: int,
    keep_as: str | None,
    prefix: str,
) -> Asked:
    """Have `n` answers to `messages` written.

    Args:
        settings: the request, with the fields of :class:`heron.serve.openai.Sampled`.
        form: "json_object", or "json_schema" and the schema, that the answer must have; None: any.
        forced: a function that must be called; empty: one of `tools`; None: none must be.
        keep_as: the id under which the conversation is kept; empty: the answer's; None: it is not.
        prefix: of the answer's id.
    """
    size = sum(len(message.content) for message in messages)
    read = service.template, served.tokenizer, messages, tools, think, start.pending
    prompt = await worked(size, prompt_of, *read)
    grammar = None if form is None and forced is None else _grammar(tools, form, forced, prompt.opened)
    most = min(USUAL_TOKENS, service.config.max_answer) if max_tokens is None else max_tokens
    jobs = await service.jobs(served, prompt, start, settings, most, USUAL, n, logprobs, grammar, keeps=True)
    answers = [Answer(number, job, Parts(prompt.opened, bool(tools))) for number, job in enumerate(jobs)]
    asked_id = wire.new_id(prefix)
    keep_as = asked_id if keep_as == "" else keep_as
    sampling = sampling_of(settings, USUAL)
    return Asked(service, served, start, messages, tools, sampling, answers, asked_id, int(time.time()), keep_as)


def _grammar(
    tools: tuple[Mapping[str, Any], ...],
    form: tuple[str, JsonSchema | None] | None,
    forced: str | None,
    opened: str,
) -> Callable[[Grammars], Grammar]:
    """What makes the grammar that the answer must follow: that of a call, or of a form."""
    if forced is not None:
        wanted = [tool for tool in tools if forced in ("", tool["name"])]
        if not wanted:
            raise Refusal(400, f"tool_choice: there is no tool {forced!r}" if forced else "tools: none given", "tools")
        return functools.partial(Grammars.of_call, tools=wanted, opened=opened)
    kind, schema = form or ("json_object", None)
    of_schema = None if kind == "json_object" or schema is None else (schema.schema_ or {})
    return functools.partial(Grammars.of_json, schema=of_schema, param="response_format", opened=opened)


# -- what is sent -----------------------------------------------------------------------------------------------------


async def whole(asked: Asked, with_logprobs: bool) -> dict[str, Any]:
    """All answers, once they are written."""

    async def read(answer: Answer) -> None:
        async for piece in asked.drawn(answer):
            answer.take(piece)

    await gathered(asked.cancel, [read(answer) for answer in asked.answers])
    choices = []
    for answer in asked.answers:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content or (None if answer.calls else "")}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [call_on_wire(call) for call in answer.calls]
        scored = {"content": wire.scored(answer.tokens, asked.served.tokenizer)} if with_logprobs else None
        choices.append({"index": answer.number, "message": message, "logprobs": scored, "finish_reason": answer.finish})
    return {
        "id": asked.id,
        "object": "chat.completion",
        "created": asked.created,
        "model": asked.served.name,
        "choices": choices,
        "usage": asked.usage,
    }


async def gathered(cancel: Callable[[], None], readers: list[Any]) -> None:
    """Run them all; where one fails, the others are ended too."""
    try:
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        cancel()


async def stream(asked: Asked, with_logprobs: bool, with_usage: bool) -> AsyncGenerator[bytes]:
    """Server-sent events: the answers in pieces, to [DONE]."""
    about = {"id": asked.id, "object": "chat.completion.chunk", "created": asked.created, "model": asked.served.name}
    tokenizer = asked.served.tokenizer
    for answer in asked.answers:
        first = {"index": answer.number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        yield wire.event({**about, "choices": [first]})
    opened = wire.event({**about, "choices": []})[: -len(b"]}\n\n")]
    async with contextlib.aclosing(together(asked.answers, asked.drawn)) as drawn:
        async for answer, piece in drawn:
            parts = answer.take(piece)
            head = b'%b{"index":%d,"delta":' % (opened, answer.number)
            scores = {"content": wire.scored(piece.tokens, tokenizer)} if with_logprobs else None
            tail = b',"logprobs":%b,"finish_reason":null}]}\n\n'
            chunks = []
            for delta in _deltas(answer, parts) or ([b"{}"] if scores else []):
                chunks.append(head + delta + tail % (_json(scores) if scores else b"null"))
                scores = None  # with the first of them
            if piece.finish is not None:
                last = {"index": answer.number, "delta": {}, "logprobs": None, "finish_reason": answer.finish}
                chunks.append(wire.event({**about, "choices": [last]}))
            if chunks:
                yield b"".join(chunks)
    last = wire.event({**about, "choices": [], "usage": asked.usage}) if with_usage else b""
    yield last + wire.DONE


def _deltas(answer: Answer, parts: list[Part]) -> list[bytes]:
    """JSON of what is new, text of one kind together."""
    deltas, n_calls = [], len(answer.calls) - sum(part.call is not None for part in parts)
    for part in parts:
        if part.call is not None:
            deltas.append(_json({"tool_calls": [{"index": n_calls, **call_on_wire(part.call)}]}))
            n_calls += 1
        elif part.content:
            deltas.append(b'{"content":%b}' % wire.quoted(part.content).encode())
        else:
            deltas.append(b'{"reasoning_content":%b}' % wire.quoted(part.reasoning).encode())
    return deltas


async def together(
    answers: list[Any], drawn: Callable[[Any], AsyncGenerator[Drawn]]
) -> AsyncGenerator[tuple[Any, Drawn]]:
    """What is drawn for several answers, in the order in which it comes. A piece is asked for once the one before was
    taken, so that what `drawn` does at the end of an answer sees all of it."""
    if len(answers) == 1:
        async with contextlib.aclosing(drawn(answers[0])) as pieces:
            async for piece in pieces:
                yield answers[0], piece
        return
    queue: asyncio.Queue[tuple[Any, Drawn | Exception]] = asyncio.Queue()

    async def read(answer: Any) -> None:
        try:
            async with contextlib.aclosing(drawn(answer)) as pieces:
                async for piece in pieces:
                    queue.put_nowait((answer, piece))
                    await queue.join()
        except Exception as error:
            queue.put_nowait((answer, error))

    tasks = [asyncio.create_task(read(answer)) for answer in answers]
    try:
        n_open = len(answers)
        while n_open:
            answer, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            n_open -= piece.finish is not None
            yield answer, piece
            queue.task_done()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def call_on_wire(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": wire.new_id("call_"), "type": "function", "function": function}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
