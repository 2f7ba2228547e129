"""Hostile clients: none is answered 5xx, none takes memory, and good clients get what they would get alone."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch

import heron
from heron import tokenizer
from heron.generation import Engine, Request, Sampling
from heron.serve import limits
from tests.serve.hostile import HOSTILE, failure
from tests.serve.running import children, raw, request_of, resident_mib, running, running_alone, until
from tests.torture.result import Result

MEMORY_MIB = 20
N_SLOW, N_GONE = 200, 1000  # of 10,000 requests: senders that never finish, and clients that leave
TOKENS = 12
FLAGS = ("--tokenizer=bytes", "--rows=8", "--max_answer=64", "--cache_device=0", "--cache_host=0", "--device=cpu")


def engine_of(rows: int) -> Engine:
    torch.manual_seed(0)
    model = heron.RWKV(heron.ModelConfig("v8", 2, 32, 256, head_size=16))
    return Engine(model, tokenizer.load("bytes"), rows)


def good(client: httpx.Client, number: int) -> str:
    """The text that a good client gets."""
    body = {"prompt": "x" * (number + 1), "max_tokens": TOKENS, "temperature": 0, "logit_bias": {"0": -100}}
    return client.post("/v1/completions", json=body).json()["choices"][0]["text"]


def run(trials: int, seed: int) -> Result:
    """`trials` hostile requests from eight threads, while good clients ask; the server is a process of its own."""
    chance, failures = random.Random(seed), []
    alone = engine_of(1)
    asked = [Request("x" * (n + 1), TOKENS, Sampling(temperature=0, top_p=0.3), logit_bias={0: -100}) for n in range(8)]
    wanted = ["".join(alone.stream(request)) for request in asked]
    with (
        tempfile.TemporaryDirectory(prefix="heron-serving-") as folder,
        running_alone(_saved(alone, Path(folder)), *FLAGS) as (address, process),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        names = [chance.choice(list(HOSTILE)) for _ in range(trials)]
        with ThreadPoolExecutor(8) as pool:
            warm = [name for name in HOSTILE for _ in range(12)]  # every thread and its memory is there
            list(pool.map(lambda name: failure(address, name, random.Random(name)), warm))
            list(pool.map(lambda number: good(client, number % 8), range(64)))
            processes = [process, *children(process)]  # the engine's and that of HTTP
            memory, seconds, is_over = sum(map(resident_mib, processes)), [], threading.Event()

            def ask_on() -> None:
                number = 0
                while not is_over.is_set():
                    begun = time.monotonic()
                    text = good(client, number % 8)
                    seconds.append(time.monotonic() - begun)
                    if text != wanted[number % 8]:
                        failures.append(f"a good client got {text!r}, wanted {wanted[number % 8]!r}")
                    number += 1

            friend = threading.Thread(target=ask_on)
            friend.start()
            slow = [
                raw(address, request_of({"prompt": "a"})[: 20 + n]) for n in range(max(1, trials * N_SLOW // 10_000))
            ]
            for _ in range(max(1, trials * N_GONE // 10_000)):
                raw(address, request_of({"max_tokens": 64, "stream": True})).close()
            tries = pool.map(lambda n: failure(address, names[n], random.Random(f"{seed}-{n}")), range(trials))
            failures += filter(None, tries)
            is_over.set()
            friend.join()
            for connection in slow:
                connection.close()
        until(lambda: 'heron_open_sequences{model="tiny"} 0.0' in client.get("/metrics").text, 60)
        if (grown := sum(map(resident_mib, processes)) - memory) > MEMORY_MIB:
            failures.append(f"the server has grown by {grown:.0f} MiB")
    seconds.sort()
    slowest = 1e3 * seconds[int(0.99 * (len(seconds) - 1))]
    notes = f"grown by {max(grown, 0):.0f} MiB; a good client's slowest 1 % took {slowest:.0f} ms"
    promise = "hostile requests get 4xx or nothing, and good clients among them their own texts"
    caught = _without_checks()
    return Result(promise, trials, trials, failures, "a server that reads any JSON", caught, 1, notes)


def _saved(engine: Engine, folder: Path) -> Path:
    heron.save(engine.model, folder / "tiny.pth")
    return folder / "tiny.pth"


def _without_checks() -> int:
    """1 if requests with a key twice pass where the check of bodies is left out."""
    before = limits.strict_json
    limits.strict_json = _Nothing
    try:
        with running(engine_of(1), max_answer=64) as address:
            return int(any(failure(address, "a key twice", random.Random(seed)) for seed in range(20)))
    finally:
        limits.strict_json = before


class _Nothing:
    @staticmethod
    def loads(data: bytes) -> None:
        pass
