"""Timers and bounds on connections that uvicorn has not: a client that sends or reads slowly is cut off."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

SECONDS_FOR_HEADERS = 5.0
SECONDS_FOR_WRITING = 30.0  # that the client may leave what was sent unread
MOST_HEADER_BYTES = 1 << 16

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)  # fmt: skip


def guarded_protocol() -> type[asyncio.Protocol]:
    """uvicorn's protocol, the fast one where httptools is installed, with timers of ours."""
    if importlib.util.find_spec("httptools") is not None:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Found
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Found
    base: Any = Found

    class Guarded(base):
        """A connection whose headers must come in time, and whose client must read."""

        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _n_header_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._header_timer = self.loop.call_later(SECONDS_FOR_HEADERS, transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._header_timer = _cancelled(self._header_timer)
            self._write_timer = _cancelled(self._write_timer)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            awaits_headers = before is None or before.response_complete
            if awaits_headers:
                self._n_header_bytes += len(data)
                if self._header_timer is None:
                    self._header_timer = self.loop.call_later(SECONDS_FOR_HEADERS, self.transport.abort)
            super().data_received(data)
            if self.cycle is not before:
                self._n_header_bytes = 0
                self._header_timer = _cancelled(self._header_timer)
            elif awaits_headers and self._n_header_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(SECONDS_FOR_WRITING, self.transport.abort)

        def resume_writing(self) -> None:
            self._write_timer = _cancelled(self._write_timer)
            super().resume_writing()

    return Guarded


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
