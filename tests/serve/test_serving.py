"""Many clients at once, bad ones among them: nobody is held up, nobody says what another one should."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from heron import tokenizer
from heron.config.serve import ServeConfig
from heron.errors import ConfigError
from heron.generation import Engine, Request, Sampling
from heron.serve import create_app, protocol
from heron.serve.server import server_of
from tests.serve.running import raw, request_of, resident_mib, status_of, until

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
NO_END = {"0": -100}


async def streamed(http, **body):
    """The text of a completion that is streamed."""
    text = ""
    async with http.stream("POST", "/v1/completions", json={"stream": True, "logit_bias": NO_END, **body}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


def test_64_streams_say_what_the_engine_says_alone(serve, engine_of):
    asked = [
        dict(prompt="x" * (n % 9 + 1), max_tokens=5 + n % 11, seed=n, temperature=1, top_p=1, presence_penalty=n % 2)
        for n in range(64)
    ]

    async def all_at_once():
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=64)) as http:
            return await asyncio.gather(*(streamed(http, **one) for one in asked))

    address = serve(engine_of(16), queue=64)
    alone = engine_of(1)
    wanted = []
    for one in asked:
        sampling = Sampling(top_p=1.0, presence_penalty=one["presence_penalty"])
        request = Request(one["prompt"], one["max_tokens"], sampling, seed=one["seed"], logit_bias={0: -100})
        wanted.append("".join(alone.stream(request)))
    assert asyncio.run(all_at_once()) == wanted
    assert len(set(wanted)) == 64


def test_who_comes_is_taken_in_few_turns_of_a_busy_loop(engine_of):
    connections, taken = [], []

    def come(address):
        connections.extend(raw(address) for _ in range(128))
        turn(asyncio.get_running_loop())

    def turn(loop):
        taken.append(len(server.server_state.connections))
        server.should_exit = taken[-1] == 128 or len(taken) > 200
        loop.call_soon(turn, loop)

    config = ServeConfig(port=0)
    server = server_of(create_app(engine_of(), config), config, come)
    server.run()
    for connection in connections:
        connection.close()
    assert taken.index(128) < 32


def test_a_client_that_leaves_frees_its_place_at_once(serve, engine_of):
    engine = engine_of(1)
    address = serve(engine)
    for _ in range(20):
        connection = raw(address, request_of({"max_tokens": 30_000, "stream": True, "logit_bias": NO_END}))
        connection.recv(1)
        connection.close()
    whole = raw(address, request_of({"max_tokens": 30_000, "logit_bias": NO_END}))  # and one that does not stream
    until(lambda: engine.n_free == 0)
    whole.close()
    until(lambda: engine.n_free == 1)
    assert httpx.post(f"{address}/v1/completions", json={"max_tokens": 2}, timeout=20).status_code == 200


def test_a_client_that_does_not_read_is_cut_off_and_holds_nobody_up(serve, engine_of, monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS_FOR_WRITING", 0.3)
    engine = engine_of(2)
    address = serve(engine)
    body = {"max_tokens": 30_000, "stream": True, "logprobs": 20, "logit_bias": NO_END}
    slow = raw(address, request_of(body), receives=1024)
    until(lambda: engine.n_free == 1)
    assert httpx.post(f"{address}/v1/completions", json={"max_tokens": 5}, timeout=20).status_code == 200
    until(lambda: engine.n_free == 2, 60)
    slow.close()


def test_headers_and_bodies_must_come_in_time(serve, engine_of, monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS_FOR_HEADERS", 0.2)
    monkeypatch.setattr("heron.serve.limits.SECONDS_FOR_BODY", 0.2)
    address = serve(engine_of(1))
    assert status_of(raw(address)) is None
    assert status_of(raw(address, b"POST /v1/completions HTTP/1.1\r\nHost: local")) is None
    assert status_of(raw(address, request_of({"prompt": "a"})[:-3])) == 408
    kept = raw(address, request_of({"max_tokens": 1}))
    kept.recv(4096)
    kept.sendall(b"GET ")
    until(lambda: kept.recv(4096) == b"" or None)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request_of(b"{"), 400),
        (request_of(b"[" * 100_000), 400),
        (request_of(b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}"), 400),
        (request_of(b'{"prompt": "a", "prompt": "b"}'), 400),
        (request_of(b'{"temperature": NaN}'), 400),
        (request_of(b'{"temperature": 1e999}'), 400),
        (request_of(b'{"prompt": "\xff"}'), 400),
        (request_of(b'{"prompt": "\\ud800"}'), 400),
        (request_of(b'{"prompt": "a\\u0000b"}'), 400),
        (request_of(b'{"prompt": [256]}'), 400),
        (request_of(b'{"prompt": [-1]}'), 400),
        (request_of(b'{"max_tokens": 1e30}'), 400),
        (request_of(b'{"n": 17}'), 400),
        (request_of(b"[]"), 400),
        (request_of({f"x{n}": 1 for n in range(300)}), 400),
        (request_of(b""), 400),
        (request_of(b"{}", Content_Type="text/plain"), 415),
        (request_of(b"{}", Host="example.org"), 403),
        (request_of(b"{}", Origin="http://example.org"), 403),
        (request_of(b"{}", Origin="null"), 403),
        (request_of(b"{}", path="/v1/completion"), 404),
        (request_of(b"{}", path="/v1/states/..%2f..%2fetc/load"), 404),
        (request_of(b'{"session_id": "a"}', path="/v1/states/.hidden/load"), 400),
        (request_of(b'{"name": "../x", "session_id": "a"}', path="/v1/states"), 400),
        (request_of(b'{"name": "a", "fork": "a\\u0000"}', path="/v1/states"), 400),
        (request_of(b" " * (1 << 20) + b"{}"), 413),
        (b"GET /page/..%2f__init__.py HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /page/../__init__.py HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"PUT /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000, 431),
    ],
)
def test_what_is_hostile_is_answered_4xx(shared, data, status):
    assert status_of(raw(shared, data)) == status


def test_no_answer_tells_about_the_machine(http):
    for path, body in (("/v1/states", {"name": "a", "session_id": "b"}), ("/v1/completions", {"prompt": [999]})):
        text = http.post(path, json=body).text
        assert "/" not in json.loads(text)["error"]["message"].replace("/v1", "")
        assert "Traceback" not in text


def test_what_is_said_is_watched(http):
    http.post("/v1/completions", json={"max_tokens": 3, "logit_bias": NO_END})
    page = http.get("/metrics").text
    assert 'heron_http_responses_total{route="/v1/completions",status="200"}' in page
    assert "heron_open_sequences" in page
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200


def test_every_answer_carries_the_headers_of_a_page_that_runs_nothing_foreign(http):
    for answer in (http.get("/health"), http.get("/nowhere"), http.post("/v1/completions", content="{")):
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_pages_named_may_ask_and_others_not(serve, engine_of):
    address = serve(engine_of(1), cors="https://friend.example")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    friend = httpx.options(f"{address}/v1/completions", headers={"Origin": "https://friend.example", **asks})
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    other = httpx.options(f"{address}/v1/completions", headers={"Origin": "https://other.example", **asks})
    assert other.status_code == 403


def test_a_page_that_may_ask_can_read_why_it_is_refused(serve, engine_of):
    address = serve(engine_of(1), cors="https://friend.example", api_key="secret")
    for origin, status, readable in (("https://friend.example", 401, True), ("https://other.example", 403, False)):
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a"}, headers={"Origin": origin})
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == (origin if readable else None)


@pytest.mark.parametrize("cors", ["friend.example", "https://friend.example/", "https://Friend.example", "*"])
def test_a_page_that_no_browser_could_name_so_is_refused(cors):
    with pytest.raises(ConfigError, match="cors: wanted origins as browsers send them"):
        ServeConfig(cors=f"https://a.example:8080, {cors}")


def test_the_key_guards_everything_but_the_page_and_the_pulse(serve, engine_of):
    with httpx.Client(base_url=serve(engine_of(1), api_key="secret")) as http:
        assert http.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/states"):
            assert http.get(path).status_code == 401
            for wrong in ("secret", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret", "Bearer é"):
                assert http.get(path, headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
            assert http.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_an_address_that_others_reach_needs_a_key(host):
    with pytest.raises(ConfigError, match="needs a key"):
        ServeConfig(host=host)
    assert ServeConfig(host=host, api_key="k")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_an_address_of_this_machine_needs_none(host):
    assert ServeConfig(host=host).is_local


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 201, "a\n"])
def test_a_key_that_headers_cannot_carry_is_refused(key):
    with pytest.raises(ConfigError, match="api_key"):
        ServeConfig(api_key=key)


def test_memory_and_places_are_back_after_many_requests(serve, engine_of):
    engine = engine_of(8)
    address = serve(engine, cache_device=0, cache_host=0)

    async def some(n):
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            await asyncio.gather(*(streamed(http, prompt="a", max_tokens=2) for _ in range(n)))

    asyncio.run(some(40))
    before = resident_mib()
    begun = time.monotonic()
    for _ in range(4):
        asyncio.run(some(60))
    assert resident_mib() - before < 16, f"after {time.monotonic() - begun:.1f} s"
    assert engine.n_free == 8


def test_a_vocabulary_of_integers_is_served_by_its_ids(serve, random_model):
    address = serve(Engine(random_model(vocab_size=10), tokenizer.load("integers:10"), 2))

    def completion(**more):
        asked = {"prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0, **more}
        return httpx.post(f"{address}/v1/completions", json=asked, timeout=30).json()["choices"][0]

    whole = completion()
    ids = [int(word) for word in whole["text"].split()]
    assert len(ids) == 6
    assert completion(prompt="1 2 3") == whole
    ended = completion(stop_ids=ids[2:3])
    assert ended["finish_reason"] == "stop"
    assert [int(word) for word in ended["text"].split()] == ids[: ids.index(ids[2])]
    messages = {"messages": [{"role": "user", "content": "4"}]}
    refused = httpx.post(f"{address}/v1/chat/completions", json=messages, timeout=30)
    assert refused.status_code == 400
    assert "ask /v1/completions" in refused.text
