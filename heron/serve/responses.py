"""/v1/responses: OpenAI's newer form of a conversation, in which the server remembers what was said before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator
from typing import Any

from heron.data.template import Message
from heron.serve import chat, wire
from heron.serve.chat import Answer, Asked
from heron.serve.openai import InputItem, NamedFlatTool, ResponsesRequest, Sampled, called, text_of, think_of
from heron.serve.parts import Call
from heron.serve.refusals import Refusal, forgotten
from heron.serve.service import Service

PREFIX = "resp_"


async def ask(service: Service, body: ResponsesRequest) -> Asked:
    """Have the answer written. Refusal, or another HeronError, for what cannot be."""
    served = service.models.get(body.model)
    state, before = body.state, ()
    if body.previous_response_id is not None:
        kept = service.conversations.find(body.previous_response_id)
        if kept is None:
            asked = f"previous_response_id {body.previous_response_id!r:.80}"
            raise forgotten(asked, "previous_response_id", "previous_response_not_found")
        if kept.model != served.name:
            raise Refusal(400, f"previous_response_id: that was written by {kept.model}", "previous_response_id")
        state, before = kept.state, kept.messages
    instructions = (Message("system", body.instructions),) if body.instructions else ()
    asked_now = [Message("user", body.input)] if isinstance(body.input, str) else _messages(body.input)
    # Instructions are for this answer alone; those of the response before are not carried over.
    before = tuple(one for one in before if not (instructions and one.role == "system"))
    messages = (*instructions, *before, *asked_now)
    if not messages:
        raise Refusal(400, "input: wanted at least one message", "input")
    tools = () if body.tool_choice == "none" else tuple(tool.as_dict for tool in body.tools or ())
    wanted = body.text.format if body.text else None
    forced = body.tool_choice.name if isinstance(body.tool_choice, NamedFlatTool) else None
    return await chat.answer(
        service, served, await service.start_of(served, state), messages, tools,
        settings=Sampled.model_validate({name: getattr(body, name) for name in ("temperature", "top_p", "seed")}),
        max_tokens=body.max_output_tokens,
        think=think_of(body.reasoning.effort if body.reasoning else None, None),
        logprobs=None,
        form=None if wanted is None or wanted.type == "text" else (wanted.type, wanted),
        forced="" if body.tool_choice == "required" else forced,
        n=1,
        keep_as=None if body.store is False else "",
        prefix=PREFIX,
    )  # fmt: skip


def _messages(items: list[InputItem]) -> list[Message]:
    messages: list[Message] = []
    for number, item in enumerate(items):
        if item.type == "message":
            if item.role is None:
                raise Refusal(400, f"input[{number}]: a message needs a role", "input")
            role = "system" if item.role == "developer" else item.role
            messages.append(Message(role, text_of(item.content)))
        elif item.type == "function_call":
            if item.name is None:
                raise Refusal(400, f"input[{number}]: a function call needs a name", "input")
            call = called(item.name, item.arguments or "")
            if messages and messages[-1].role == "assistant":  # what it said before and what it calls are one turn
                messages[-1] = dataclasses.replace(messages[-1], tool_calls=(*messages[-1].tool_calls, call))
            else:
                messages.append(Message("assistant", "", "", (call,)))
        elif item.type == "function_call_output":
            messages.append(Message("tool", text_of(item.output)))
    return messages


# -- what is sent -----------------------------------------------------------------------------------------------------


async def whole(asked: Asked) -> dict[str, Any]:
    """The response, once it is written."""
    answer = asked.answers[0]

    async def read() -> None:
        async for piece in asked.drawn(answer):
            answer.take(piece)

    await chat.gathered(asked.cancel, [read()])
    return _kept(asked, _items(answer))


def _items(answer: Answer) -> list[dict[str, Any]]:
    """What a written answer consists of."""
    items = []
    if answer.reasoning:
        items.append(_reasoning(answer.reasoning))
    if answer.content or not answer.calls:
        items.append(_message(wire.new_id("msg_"), answer.content))
    return [*items, *(_call(call) for call in answer.calls)]


def _reasoning(text: str) -> dict[str, Any]:
    return {
        "id": wire.new_id("rs_"),
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def _message(item_id: str, text: str | None) -> dict[str, Any]:
    """None: it is still to be written."""
    content = [] if text is None else [_part(text)]
    status = "in_progress" if text is None else "completed"
    return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": wire.new_id("fc_"),
        "type": "function_call",
        "call_id": wire.new_id("call_"),
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _response(asked: Asked, items: list[dict[str, Any]]) -> dict[str, Any]:
    answer = asked.answers[0]
    is_cut = answer.finish == "length"
    status = "in_progress" if answer.finish is None else "incomplete" if is_cut else "completed"
    usage = None
    if answer.finish is not None:
        job = answer.job
        usage = {
            "input_tokens": job.n_prompt,
            "input_tokens_details": {"cached_tokens": job.n_cached},
            "output_tokens": job.n_drawn,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.n_prompt + job.n_drawn,
        }
    return {
        "id": asked.id,
        "object": "response",
        "created_at": asked.created,
        "status": status,
        "model": asked.served.name,
        "output": items,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": False,
        "temperature": asked.sampling.temperature,
        "top_p": asked.sampling.top_p,
        "tool_choice": "auto",
        "tools": [{"type": "function", "strict": False, **tool} for tool in asked.tools],
        "usage": usage,
    }


async def stream(asked: Asked) -> AsyncGenerator[bytes]:
    """Server-sent events of the response as it is written, each with its name and its number."""
    answer, numbers = asked.answers[0], iter(range(1 << 62))

    def event(kind: str, **fields: Any) -> bytes:
        return wire.event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    yield event("response.created", response=_response(asked, []))
    yield event("response.in_progress", response=_response(asked, []))
    items: list[dict[str, Any]] = []
    message_id, text, thought = wire.new_id("msg_"), None, ""
    async with contextlib.aclosing(asked.drawn(answer)) as drawn:
        async for piece in drawn:
            for part in answer.take(piece):
                thought += part.reasoning
                if part.content and text is None:
                    text = ""
                    place = {"item_id": message_id, "output_index": len(items), "content_index": 0}
                    item = _message(message_id, None)
                    yield event("response.output_item.added", output_index=len(items), item=item)
                    yield event("response.content_part.added", **place, part=_part(""))
                if part.content:
                    text = (text or "") + part.content
                    yield event("response.output_text.delta", **place, delta=part.content, logprobs=[])
    if text is None and not answer.calls:  # an empty answer is one, too
        text, place = "", {"item_id": message_id, "output_index": 0, "content_index": 0}
        yield event("response.output_item.added", output_index=0, item=_message(message_id, None))
        yield event("response.content_part.added", **place, part=_part(""))
    if text is not None:
        item = _message(message_id, text)
        yield event("response.output_text.done", **place, text=text, logprobs=[])
        yield event("response.content_part.done", **place, part=_part(text))
        yield event("response.output_item.done", output_index=len(items), item=item)
        items.append(item)
    later = [_call(call) for call in answer.calls] + ([_reasoning(thought)] if thought else [])
    for item in later:
        yield event("response.output_item.added", output_index=len(items), item=item)
        if item["type"] == "function_call":
            place = {"item_id": item["id"], "output_index": len(items)}
            yield event("response.function_call_arguments.delta", **place, delta=item["arguments"])
            yield event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            )
        yield event("response.output_item.done", output_index=len(items), item=item)
        items.append(item)
    kind = "response.incomplete" if answer.finish == "length" else "response.completed"
    yield event(kind, response=_kept(asked, items))


def _kept(asked: Asked, items: list[dict[str, Any]]) -> dict[str, Any]:
    """The written response, which is kept with its conversation."""
    response = _response(asked, items)
    if asked.keep_as is not None:
        asked.service.conversations.keep_response(asked.keep_as, json.dumps(response))
    return response
