"""Requests that no honest client sends, each to be answered 4xx or with a closed connection."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from tests.serve.running import raw, request_of, status_of

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/tokenize", "/v1/detokenize",
    "/v1/states", "/v1/states/a/load",
)  # fmt: skip
_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "-1000", "1e6", "true", '"1"', "[]", "{}")
_FIELDS = (
    "temperature", "top_p", "top_k", "max_tokens", "n", "seed", "presence_penalty", "frequency_penalty", "logprobs",
    "penalty_decay", "stop", "logit_bias", "stop_ids", "best_of",
)  # fmt: skip


def _number(rng: random.Random) -> bytes:
    field, number = rng.choice(_FIELDS), rng.choice(_NUMBERS)
    refused = {"true", '"1"', "[]", "{}", "1e6"}  # some fields take these
    while number in refused:
        number = rng.choice(_NUMBERS)
    return request_of(f'{{"prompt": "a", "{field}": {number}}}'.encode())


def _bytes_in_place_of_http(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n"


HOSTILE: dict[str, Callable[[random.Random], bytes]] = {
    "bad JSON": lambda rng: request_of(b'{"prompt": "a", "n": 1}'[: rng.randint(1, 22)], rng.choice(PATHS)),
    "deep JSON": lambda rng: request_of(b"[" * rng.choice((65, 1000, 100_000)), rng.choice(PATHS)),
    "deep and closed": lambda rng: request_of(b'{"metadata": %b%b}' % (b"[" * 200, b"]" * 200), rng.choice(PATHS)),
    "random bytes": lambda rng: request_of(b"\xff" + rng.randbytes(rng.randint(1, 500)), rng.choice(PATHS)),
    "a number out of range": _number,
    "an id out of range": lambda rng: request_of({"prompt": [rng.choice((256, -1, 2**31, 2**63))]}),
    "a key twice": lambda rng: request_of(b'{"prompt": "a", "prompt": "b"}', rng.choice(PATHS)),
    "half a character": lambda rng: request_of(b'{"prompt": "\\ud8%02x"}' % rng.randrange(256), "/v1/completions"),
    "an unknown field": lambda rng: request_of({f"x{rng.random()}": 1}, rng.choice(PATHS)),
    "a list for an object": lambda rng: request_of([], rng.choice(PATHS)),
    "a large body": lambda rng: request_of(b'{"prompt": "' + b"a" * (1 << 20) + b'"}', rng.choice(PATHS)),
    "a body that was announced larger": lambda rng: request_of(b"{}", Content_Length=10 ** rng.randint(1, 30))[:-1],
    "another type": lambda rng: request_of(b"a=b", Content_Type=rng.choice(("text/plain", "", "x/y; z"))),
    "a foreign page": lambda rng: request_of({}, Origin=rng.choice(("http://a.b", "null", "//", "http://localhost.a"))),
    "a foreign host": lambda rng: request_of({}, Host=rng.choice(("a.b", "", "127.0.0.1.a.b", "[", "localhost@a"))),
    "a path": lambda rng: (
        b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n"
        % rng.choice((b"page/..%2f..%2fx", b"page/%00", b"../x", b"v1/models/..%2f", b"\xff", b"page//etc/passwd"))
    ),
    "a state's name": lambda rng: request_of(
        {"name": rng.choice(("../a", ".a", "a/b", "", "a" * 65, "a\0", "ä")), "session_id": "a"}, "/v1/states"
    ),
    "no HTTP": _bytes_in_place_of_http,
    "long headers": lambda rng: b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * rng.randint(70_000, 200_000),
    "many headers": lambda rng: b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 20_000,
    "a schema": lambda rng: request_of(
        {
            "messages": [{"role": "user", "content": "a"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _schema(rng)}},
        },
        "/v1/chat/completions",
    ),
    "many wrong parts": lambda rng: request_of(
        {"messages": [{"role": "user", "content": [{}] * rng.choice((5000, 20_000))}]}, "/v1/chat/completions"
    ),
    "many wrong ids": lambda rng: request_of({"prompt": [rng.choice((-1, 1.5, None, {}))] * 10_000}),
    "many unknown fields": lambda rng: request_of({f"x{n}": 1 for n in range(3000)}, rng.choice(PATHS)),
    "an endless message list": lambda rng: request_of(
        {"messages": [{"role": "user", "content": ""}] * 5000}, "/v1/chat/completions"
    ),
}


def _schema(rng: random.Random) -> dict[str, object]:
    return rng.choice(
        (
            {"type": "nothing"}, {"anyOf": []}, {"$ref": "#"}, {"$ref": "http://a/b"}, {"enum": []},
            {"type": "string", "pattern": "("}, {"enum": ["x" * 70_000]}, {"type": "object", "properties": 3},
        )
    )  # fmt: skip


def failure(address: str, name: str, rng: random.Random) -> str | None:
    """What went wrong with one hostile request, if anything did."""
    data = HOSTILE[name](rng)
    try:
        status = status_of(raw(address, data))
    except (ConnectionError, BrokenPipeError):  # closed while we were sending
        return None
    except TimeoutError:
        return f"{name}: no answer to {data[:200]!r}"
    if status is not None and not 400 <= status < 500:
        return f"{name}: {status} for {json.dumps(data[:300].decode('latin-1'))}"
    return None
