"""Clients that stream completions from a server, all alike: what `benchmarks/serve.py` runs beside the server.

They are few lines over sockets, in several processes, so that the server is what is measured.
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


class Stream(asyncio.Protocol):
    """Sends a request and takes what comes: its texts are not parsed, but the usage behind them is."""

    def __init__(self, request: bytes):
        self._request, self._tail, self._began = request, b"", time.perf_counter()
        self._first, self._got = 0.0, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._first and b'"text":' in data:
            self._first = time.perf_counter() - self._began
        self._tail = data if len(data) > 4096 else (self._tail + data)[-4096:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._got.done():
            self._got.set_result(str(exc) if exc else "")

    async def asked(self, port: int) -> Asked:
        """What has come by the end of the connection."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)
                error = await self._got
        except (OSError, TimeoutError) as failed:
            error = str(failed) or type(failed).__name__
        seconds, found, written = time.perf_counter() - self._began, self._tail.rfind(b'"completion_tokens":'), 0
        if not error and (found < 0 or b"[DONE]" not in self._tail):
            error = self._tail[-300:].decode("utf-8", "replace")
        if not error:
            written = int(self._tail[found + 20 :].split(b",")[0])
        return Asked(self._first, seconds, self._began, written, error)


async def ask(port: int, prompt: list[int], tokens: int, seed: int) -> Asked:
    """One streamed completion."""
    body = {
        "prompt": prompt, "max_tokens": tokens, "stream": True, "seed": seed, "temperature": 1, "top_p": 0.5,
        "stream_options": {"include_usage": True}, "logit_bias": {},
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return await Stream(head.encode() + data).asked(port)


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

    async def client(number: int) -> None:
        await asyncio.sleep(wanted.arrive * number / wanted.clients)
        while True:
            prompt = [chance.randrange(1, wanted.vocab_size) for _ in range(wanted.prompt)]
            answers.append(await ask(wanted.port, prompt, wanted.tokens, chance.randrange(LARGEST_SEED)))
            if time.perf_counter() >= end:
                return

    await asyncio.gather(*(client(number) for number in range(wanted.clients)))
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
