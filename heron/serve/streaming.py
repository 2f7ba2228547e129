"""A response of server-sent events that ends when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response

from heron.errors import HeronError
from heron.serve import wire
from heron.serve.refusals import Refusal, of_error

_log = logging.getLogger("heron.serve")


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: the bytes of one or more whole events at a time; nothing comes after :data:`heron.serve.wire.DONE`.
        cancel: called when the client has left, or the stream has ended.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], cancel: Callable[[], None]):
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._cancel = events, cancel

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watch = asyncio.create_task(when_gone(receive, self._cancel))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(_guarded(self._events)) as events:
                goes_on = True
                async for event in events:
                    goes_on = not event.endswith(wire.DONE)
                    await send({"type": "http.response.body", "body": event, "more_body": goes_on})
            if goes_on:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._cancel()


async def when_gone(receive: Any, cancel: Callable[[], None]) -> None:
    """Wait until the client has left, then cancel."""
    while (await receive())["type"] != "http.disconnect":
        pass
    cancel()


async def _guarded(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events; an error becomes the last one, since the status is sent already."""
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
    except HeronError as error:
        yield wire.event(of_error(error).body) + wire.DONE
    except Exception:
        _log.exception("a stream has failed")
        yield wire.event(Refusal(500, "the server has failed; its log says why").body) + wire.DONE
