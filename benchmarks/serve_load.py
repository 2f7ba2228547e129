"""Clients that ask a server for minutes, each something else: what `benchmarks/serve.py --minutes` runs in a process.

Chats that grow and are streamed, sessions that are saved and begun from, responses that follow one another, short and
long prompts, and clients that leave. The server's answers are checked for their form; the times are of streams.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

TIMEOUT_S = 300
LETTERS = {str(token): -100 for token in range(256) if not 97 <= token <= 122}  # so that random weights write text
TURNS = 6
TEXT = "a river of small stones runs under the old bridge and nobody has counted them since the mill was built"


class UnexpectedError(Exception):
    """An answer that a client did not ask for."""


@dataclasses.dataclass
class Found:
    """What the clients have seen, times in seconds."""

    asked: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    firsts: dict[str, list[float]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    gaps: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    n_tokens: int = 0
    levels: list[str] = dataclasses.field(default_factory=list)  # of the prefix cache, as /metrics has them


class Answer:
    """What comes back of one request, behind the head."""

    def __init__(self, reader: asyncio.StreamReader, head: str):
        self._reader, self.status = reader, int(head.split()[1])
        self._is_chunked = "transfer-encoding: chunked" in head

    async def pieces(self) -> AsyncGenerator[bytes]:
        if not self._is_chunked:
            yield await self._reader.read(-1)
            return
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def text(self) -> str:
        return b"".join([piece async for piece in self.pieces()]).decode()


@contextlib.asynccontextmanager
async def asked(port: int, method: str, path: str, body: Any = None) -> AsyncGenerator[Answer]:
    """A request over a connection of its own, which ends with the block."""
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + data)
            yield Answer(reader, (await reader.readuntil(b"\r\n\r\n")).decode().lower())
        finally:
            writer.close()


class Client:
    """One of many: does one thing after another until the time is over."""

    def __init__(self, port: int, number: int, tokens: int, found: Found):
        self._port, self._tokens, self._found = port, tokens, found
        self._number, self._chance = number, random.Random(number)
        self._chats = collections.deque[list[dict[str, str]]](maxlen=20)

    async def run(self, end: float) -> None:
        kinds = [self.chat, self.chat, self.session, self.responses, self.short, self.long, self.leave]
        while time.monotonic() < end:
            await self.one(self._chance.choice(kinds))

    async def one(self, kind: Callable[[], Awaitable[None]]) -> None:
        try:
            await kind()
        except (UnexpectedError, OSError, EOFError, TimeoutError, ValueError, LookupError) as error:
            self._found.errors.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:300])

    async def every_kind(self) -> None:
        for kind in (self.chat, self.session, self.responses, self.short, self.long, self.leave):
            await self.one(kind)

    # -- what it does ---------------------------------------------------------------------------------------------

    async def chat(self) -> None:
        """A new one, or an earlier one goes on, whose states are on some level of the cache by then."""
        messages = self._chance.choice(self._chats) if self._chats and self._chance.random() < 0.3 else []
        self._chats.append(messages)
        for _ in range(self._chance.randint(1, TURNS)):
            messages.append({"role": "user", "content": self._said(8)})
            answer = await self._stream("chat", "/v1/chat/completions", {"messages": messages})
            messages.append({"role": "assistant", "content": answer})

    async def session(self) -> None:
        name = f"client-{self._number}"
        body = {"messages": [{"role": "user", "content": self._said(8)}]}
        await self._whole("session", "/v1/chat/completions", {**body, "session_id": name})
        await self._json("POST", "/v1/states", {"name": name, "session_id": name})
        await self._whole("session", "/v1/chat/completions", {**body, "state": name})
        await self._json("DELETE", f"/v1/states/{name}")

    async def responses(self) -> None:
        before = None
        for _ in range(2):
            self._found.asked["response"] += 1
            body = {"input": self._said(8), "max_output_tokens": self._tokens, "previous_response_id": before}
            answer = await self._json("POST", "/v1/responses", body)
            before = answer["id"]
        await self._json("DELETE", f"/v1/responses/{before}")

    async def short(self) -> None:
        await self._whole("short", "/v1/completions", {"prompt": self._said(2)})

    async def long(self) -> None:
        await self._stream("long", "/v1/completions", {"prompt": self._said(400)})

    async def leave(self) -> None:
        """Go in the middle of a stream."""
        self._found.asked["leave"] += 1
        body = {"prompt": self._said(20), "max_tokens": 40 * self._tokens}
        n_wanted, n_seen = self._chance.randint(1, 4), 0
        async with contextlib.aclosing(self._events("/v1/completions", body)) as events:
            async for _ in events:
                n_seen += 1
                if n_seen == n_wanted:
                    return

    # -- how it asks ----------------------------------------------------------------------------------------------

    def _said(self, most: int) -> str:
        return " ".join(self._chance.choice(TEXT.split()) for _ in range(self._chance.randint(1, most)))

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"max_tokens": self._tokens, "logit_bias": LETTERS, "seed": self._chance.randrange(1 << 30), **body}

    async def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        async with asked(self._port, method, path, body) as answer:
            text = await answer.text()
            _check(answer.status == 200, text)
            return json.loads(text)

    async def _whole(self, kind: str, path: str, body: dict[str, Any]) -> None:
        self._found.asked[kind] += 1
        n = (await self._json("POST", path, self._body(body)))["usage"]["completion_tokens"]
        _check(n == self._tokens, f"{n} tokens")
        self._found.n_tokens += n

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[str]:
        """The data of each event."""
        body = {**self._body(body), "stream": True, "stream_options": {"include_usage": True}}
        async with asked(self._port, "POST", path, body) as answer:
            _check(answer.status == 200, "" if answer.status == 200 else await answer.text())
            rest = b""
            async for piece in answer.pieces():
                *events, rest = (rest + piece).split(b"\n\n")
                for event in events:
                    yield event.decode().removeprefix("data: ")

    async def _stream(self, kind: str, path: str, body: dict[str, Any]) -> str:
        """The text of a streamed answer, whose times are noted."""
        self._found.asked[kind] += 1
        last, is_first, text, n, event = time.perf_counter(), True, "", 0, ""
        async for event in self._events(path, body):
            if event == "[DONE]":
                continue
            piece = json.loads(event)
            n = (piece.get("usage") or {}).get("completion_tokens", n)
            for choice in piece["choices"]:
                new = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                if not new:
                    continue
                text += new
                now = time.perf_counter()
                (self._found.firsts[kind] if is_first else self._found.gaps).append(now - last)
                last, is_first = now, False
        _check(event == "[DONE]", event)
        _check(n == self._tokens, f"{n} tokens")
        self._found.n_tokens += n
        return text


def _check(is_right: bool, got: str) -> None:
    if not is_right:
        raise UnexpectedError(got)


async def load(port: int, clients: int, tokens: int, seconds: float) -> Found:
    """Let `clients` ask for `seconds`, and gather what they saw; 0 seconds: each kind of request once."""
    found = Found()
    those = [Client(port, number, tokens, found) for number in range(clients)]
    end = time.monotonic() + seconds
    await asyncio.gather(*(client.run(end) if seconds else client.every_kind() for client in those))
    async with asked(port, "GET", "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found.levels = [line for line in lines if line.startswith("heron_prefix_")]
    return found


if __name__ == "__main__":
    print(json.dumps(vars(asyncio.run(load(**json.loads(sys.argv[1]))))))
