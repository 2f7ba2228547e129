"""/v1/states: saved states of conversations, by name."""

from __future__ import annotations

from typing import Any

from heron.serve.engines import Engines
from heron.serve.openai import LoadRequest, StateRequest
from heron.serve.prompts import conversation_ids
from heron.serve.refusals import Refusal, forgotten
from heron.serve.service import Kept, Service
from heron.serve.threads import worked


async def save(service: Service, body: StateRequest) -> dict[str, Any]:
    """Write a state from a session, from a response, or as a copy of another one."""
    wanted = [name for name in ("session_id", "response_id", "fork") if getattr(body, name) is not None]
    if len(wanted) != 1:
        raise Refusal(400, f"wanted one of session_id, response_id and fork, got {len(wanted)} of them")
    if body.fork is not None:
        await service.link.ask(Engines.fork_state, body.fork, body.name)
    else:
        kept = service.conversations.find(body.session_id or body.response_id or "")
        if kept is None:
            raise forgotten(f"{wanted[0]} {body.session_id or body.response_id!r:.80}", wanted[0])
        served = service.models.get(kept.model)
        if kept.messages:
            start = await service.start_of(served, kept.state)
            read = service.template, served.tokenizer, kept.messages, kept.tools, start.pending
            ids = await worked(kept.n_characters, conversation_ids, *read)
            await service.link.ask(Engines.save_text, body.name, served.engine, ids, start)
        elif not await service.link.ask(Engines.save_session, body.name, served.engine, body.session_id or ""):
            raise Refusal(404, f"{wanted[0]}: nothing was read in it, or it was forgotten", wanted[0], "not_found")
    return on_wire(body.name)


async def load(service: Service, name: str, body: LoadRequest) -> dict[str, Any]:
    """Let a session begin from a state."""
    served = service.models.get(body.model)
    start = await service.start_of(served, name)  # refuses another model's
    service.conversations.keep(body.session_id, Kept(served.name, name))
    await service.link.ask(Engines.begin_session, body.session_id, served.engine, start)
    return on_wire(name)


def on_wire(name: str) -> dict[str, Any]:
    return {"id": name, "object": "state"}
