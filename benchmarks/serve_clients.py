"""Clients that stream completions from a server, all alike: what `benchmarks/serve.py` runs beside the server.

They are few lines over sockets, in several processes, so that the server is what is measured. Each keeps its
connection, as OpenAI's client does.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import sys
import time
from typing import Any, NamedTuple

from heron.config import LARGEST_SEED

TIMEOUT_S = 300
MOST_OF_A_PROCESS = 64  # clients


class Asked(NamedTuple):
    """What came of one request."""

    first: float  # seconds to the first token
    seconds: float  # to the end
    began: float
    tokens: int
    error: str

    def tokens_until(self, end: float) -> float:
        """How many tokens had come by then; from the first to the last they came evenly."""
        since = self.began + self.first
        return self.tokens * min(max(end - since, 0.0) / max(self.began + self.seconds - since, 1e-9), 1.0)


class Client(asyncio.Protocol):
    """A connection, kept from one request to the next. Texts are not parsed, but the usage behind them is."""

    _transport: Any = None

    def __init__(self, port: int):
        self._port = port
        self._began, self._first, self._tail = 0.0, 0.0, b""
        self._ended = asyncio.Future[str]()  # with what went wrong

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._first and b'"text":' in data:
            self._first = time.perf_counter() - self._began
        self._tail = data if len(data) > 4096 else (self._tail + data)[-4096:]
        if self._tail.endswith(b"0\r\n\r\n"):
            self._end("")
        elif not self._first and not self._tail.startswith(b"HTTP/1.1 200"):
            self._end(self._tail[-300:].decode("utf-8", "replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(str(exc or "the server has closed the connection"))

    def _end(self, error: str) -> None:
        if not self._ended.done():
            self._ended.set_result(error)

    async def ask(self, prompt: list[int], tokens: int, seed: int) -> Asked:
        """One streamed completion."""
        self._began, self._first, self._tail, self._ended = time.perf_counter(), 0.0, b"", asyncio.Future()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if self._transport is None:
                    await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)
                self._transport.write(_request(self._port, prompt, tokens, seed))
                error = await self._ended
        except (OSError, TimeoutError) as failed:
            error = str(failed) or type(failed).__name__
        seconds, found, written = time.perf_counter() - self._began, self._tail.rfind(b'"completion_tokens":'), 0
        if not error and (found < 0 or b"[DONE]" not in self._tail):
            error = self._tail[-300:].decode("utf-8", "replace")
        if not error:
            written = int(self._tail[found + 20 :].split(b",")[0])
        return Asked(self._first, seconds, self._began, written, error)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _request(port: int, prompt: list[int], tokens: int, seed: int) -> bytes:
    body = {
        "prompt": prompt, "max_tokens": tokens, "stream": True, "seed": seed, "temperature": 1, "top_p": 0.5,
        "stream_options": {"include_usage": True}, "logit_bias": {},
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Wanted(NamedTuple):
    """What clients ask for."""

    port: int
    clients: int
    vocab_size: int
    prompt: int  # tokens
    tokens: int  # of each answer
    arrive: float  # seconds over which they come
    last: float  # seconds for which they ask again and again
    seed: int


class Found(NamedTuple):
    """What they got."""

    answers: list[Asked]
    cpu: float  # seconds that they took of one


async def clients(wanted: Wanted) -> Found:
    """What the clients of one process got."""
    chance = random.Random(wanted.seed)
    before, end = time.process_time(), time.perf_counter() + wanted.last
    answers: list[Asked] = []

    async def run(number: int) -> None:
        await asyncio.sleep(wanted.arrive * number / wanted.clients)
        client = Client(wanted.port)
        while True:
            prompt = [chance.randrange(1, wanted.vocab_size) for _ in range(wanted.prompt)]
            answers.append(await client.ask(prompt, wanted.tokens, chance.randrange(LARGEST_SEED)))
            if time.perf_counter() >= end:
                return client.close()

    await asyncio.gather(*(run(number) for number in range(wanted.clients)))
    return Found(answers, time.process_time() - before)


def run(wanted: Wanted) -> Found:
    return asyncio.run(clients(wanted))


def in_processes(wanted: Wanted) -> Found:
    """What all of them got."""
    n = -(-wanted.clients // MOST_OF_A_PROCESS)
    share = [wanted.clients // n + (i < wanted.clients % n) for i in range(n)]
    each = [wanted._replace(clients=clients, seed=wanted.seed + i) for i, clients in enumerate(share)]
    with multiprocessing.get_context("fork").Pool(n) as pool:
        found = pool.map(run, each, chunksize=1)
    return Found([one for part in found for one in part.answers], sum(part.cpu for part in found))


if __name__ == "__main__":
    print(json.dumps(in_processes(Wanted(**json.loads(sys.argv[1])))))
