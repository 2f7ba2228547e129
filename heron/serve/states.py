"""/v1/states: saved states of conversations, by name."""

from __future__ import annotations

import asyncio
from typing import Any

from heron.generation import Snapshot
from heron.serve.models import Served
from heron.serve.openai import LoadRequest, StateRequest
from heron.serve.prompts import conversation_ids
from heron.serve.refusals import Refusal
from heron.serve.service import Kept, Service, Start


async def save(service: Service, body: StateRequest) -> dict[str, Any]:
    """Write a state from a session, from a response, or as a copy of another one."""
    wanted = [name for name in ("session_id", "response_id", "fork") if getattr(body, name) is not None]
    if len(wanted) != 1:
        raise Refusal(400, f"wanted one of session_id, response_id and fork, got {len(wanted)} of them")
    if body.fork is not None:
        await asyncio.to_thread(service.states.fork, body.fork, body.name)
    else:
        kept = service.conversations.find(body.session_id or body.response_id or "")
        if kept is None:
            raise Refusal(404, f"{wanted[0]}: nothing is kept of it (any more)", wanted[0], "not_found")
        served = service.models.get(kept.model)
        if kept.messages:
            start = await service.start_of(served, kept.state)
            snapshot = await asyncio.to_thread(_settled, service, served, kept, start)
        else:
            snapshot = await asyncio.to_thread(service.states.find, body.session_id or "")
        if snapshot is None:
            raise Refusal(404, f"{wanted[0]}: nothing was read in it, or it was forgotten", wanted[0], "not_found")
        await asyncio.to_thread(service.states.save, body.name, snapshot, served.engine)
    return on_wire(body.name)


def _settled(service: Service, served: Served, kept: Kept, start: Start) -> Snapshot:
    """The state behind a conversation as it stands in the template."""
    ids = conversation_ids(service.template, served.engine.tokenizer, kept.messages, kept.tools, start.snapshot)
    found = None if service.cache is None else service.cache.find(ids, start.key)
    before, n = (start.snapshot, 0) if found is None else found
    state = served.engine.prefill(ids[n:], None if before is None else before.state)
    return Snapshot(state)


async def load(service: Service, name: str, body: LoadRequest) -> dict[str, Any]:
    """Let a session begin from a state."""
    served = service.models.get(body.model)
    start = await service.start_of(served, name)  # refuses another model's
    service.conversations.keep(body.session_id, Kept(served.name, name))
    if start.snapshot is not None:
        await asyncio.to_thread(service.states.keep, body.session_id, start.snapshot)
    return on_wire(name)


def on_wire(name: str) -> dict[str, Any]:
    return {"id": name, "object": "state"}
