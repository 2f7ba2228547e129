"""Clients that ask a server for minutes, each something else: what `benchmarks/serve.py --minutes` runs in a process.

Chats that grow and are streamed, sessions that are saved and begun from, responses that follow one another, short and
long prompts, and clients that leave. The server's answers are checked for their form; the times are of streams.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import random
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx

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


class Client:
    """One of many: does one thing after another until the time is over."""

    def __init__(self, http: httpx.AsyncClient, number: int, tokens: int, found: Found):
        self._http, self._tokens, self._found = http, tokens, found
        self._number, self._chance = number, random.Random(number)
        self._chats = collections.deque[list[dict[str, str]]](maxlen=20)

    async def run(self, end: float) -> None:
        kinds = [self.chat, self.chat, self.session, self.responses, self.short, self.long, self.leave]
        while time.monotonic() < end:
            await self.one(self._chance.choice(kinds))

    async def one(self, kind: Callable[[], Awaitable[None]]) -> None:
        try:
            await kind()
        except (UnexpectedError, httpx.HTTPError, ValueError, LookupError) as error:
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
        await self._post("/v1/states", {"name": name, "session_id": name})
        await self._whole("session", "/v1/chat/completions", {**body, "state": name})
        answer = await self._http.delete(f"/v1/states/{name}")
        _check(answer.status_code == 200, answer.text)

    async def responses(self) -> None:
        before = None
        for _ in range(2):
            self._found.asked["response"] += 1
            body = {"input": self._said(8), "max_output_tokens": self._tokens, "previous_response_id": before}
            answer = await self._post("/v1/responses", body)
            before = answer["id"]
        answer = await self._http.delete(f"/v1/responses/{before}")
        _check(answer.status_code == 200, answer.text)

    async def short(self) -> None:
        await self._whole("short", "/v1/completions", {"prompt": self._said(2)})

    async def long(self) -> None:
        await self._stream("long", "/v1/completions", {"prompt": self._said(400)})

    async def leave(self) -> None:
        """Go in the middle of a stream."""
        self._found.asked["leave"] += 1
        body = {"prompt": self._said(20), "max_tokens": 40 * self._tokens}
        n_wanted, n_seen = self._chance.randint(1, 4), 0
        async for _ in self._events("/v1/completions", body):
            n_seen += 1
            if n_seen == n_wanted:
                return

    # -- how it asks ----------------------------------------------------------------------------------------------

    def _said(self, most: int) -> str:
        return " ".join(self._chance.choice(TEXT.split()) for _ in range(self._chance.randint(1, most)))

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"max_tokens": self._tokens, "logit_bias": LETTERS, "seed": self._chance.randrange(1 << 30), **body}

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.post(path, json=body)
        _check(answer.status_code == 200, answer.text)
        return answer.json()

    async def _whole(self, kind: str, path: str, body: dict[str, Any]) -> None:
        self._found.asked[kind] += 1
        n = (await self._post(path, self._body(body)))["usage"]["completion_tokens"]
        _check(n == self._tokens, f"{n} tokens")
        self._found.n_tokens += n

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[str]:
        """The data of each event."""
        body = {**self._body(body), "stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                raise UnexpectedError((await answer.aread()).decode("utf-8", "replace"))
            async for line in answer.aiter_lines():
                if line:
                    yield line.removeprefix("data: ")

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


async def load(address: str, clients: int, tokens: int, seconds: float) -> Found:
    """What so many clients see in so many seconds; 0: in one round of everything."""
    found = Found()
    async with httpx.AsyncClient(
        base_url=address, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)
    ) as http:
        those = [Client(http, number, tokens, found) for number in range(clients)]
        end = time.monotonic() + seconds
        await asyncio.gather(*(client.run(end) if seconds else client.every_kind() for client in those))
    return found


if __name__ == "__main__":
    print(json.dumps(vars(asyncio.run(load(**json.loads(sys.argv[1]))))))
