"""HTTP in a process of its own: what passes between the two, and that neither outlives the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import types
from pathlib import Path

import httpx
import pytest

import heron
from heron import tokenizer
from heron.generation import Engine, Request, Sampling
from heron.serve.engines import Engines
from heron.serve.processes import _Answer, _Link
from tests import warm
from tests.serve.running import children, raw, request_of, until

NO_END = {"0": -100}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(vocab_size=256)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny.pth"
    heron.save(model, path)
    return path


class Served:
    """A `heron serve`: its address, the process that was started, and the one that speaks HTTP."""

    def __init__(self, path: Path, *flags: str):
        self.process = warm.start(["-m", "heron", "serve", path, "--port", "0", "--device", "cpu", *flags])
        self.address = self.process.stdout.readline().removeprefix("listening on ").strip()
        self.children = children(self.process.pid)
        [self.http] = [child for child in self.children if "spawn_main" in command_of(child)]

    def ended(self) -> tuple[int, list[str]]:
        """The exit code and what it has said about it."""
        _, errors = self.process.communicate(timeout=30)
        until(lambda: not any(map(is_there, self.children)))
        return self.process.returncode, [line for line in errors.splitlines() if "reading" not in line]


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


def is_there(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_refused(address: str) -> bool:
    try:
        raw(address).close()
    except ConnectionRefusedError:
        return True
    return False


def endless(address: str) -> socket.socket:
    """A stream that has begun."""
    stream = raw(address, request_of({"max_tokens": 30_000, "stream": True, "logit_bias": NO_END}))
    stream.recv(1)
    return stream


pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def served(path):
    """A server that, behind the tests, waits for a stream at the first interrupt, and for nobody at the second."""
    served = Served(path, "--rows", "8", "--grace", "60")
    yield served
    stream = endless(served.address)
    served.process.send_signal(signal.SIGINT)
    until(lambda: is_refused(served.address))
    assert is_there(served.http)
    served.process.send_signal(signal.SIGINT)
    assert served.ended() == (0, [])
    stream.close()


def test_streams_say_what_the_engine_says_alone(served, model):
    asked = [dict(prompt="x" * (n % 9 + 1), max_tokens=5 + n, seed=n, temperature=1, top_p=1) for n in range(24)]

    async def text_of(http, body):
        text = ""
        body = {**body, "stream": True, "logit_bias": NO_END}
        async with http.stream("POST", f"{served.address}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    async def all_at_once():
        async with httpx.AsyncClient(timeout=60) as http:
            return await asyncio.gather(*(text_of(http, body) for body in asked))

    alone = Engine(model, tokenizer.load("bytes"))
    requests = [
        Request(body["prompt"], body["max_tokens"], Sampling(top_p=1.0), seed=body["seed"], logit_bias={0: -100})
        for body in asked
    ]
    assert asyncio.run(all_at_once()) == ["".join(alone.stream(request)) for request in requests]


def test_what_is_not_a_stream_passes_too(served):
    with httpx.Client(base_url=served.address, timeout=60) as http:

        def post(place, status=200, **body):
            answer = http.post(place, json=body)
            assert answer.status_code == status, answer.text
            return answer.json()

        user = {"role": "user", "content": "hello"}
        chat = {"messages": [user], "max_tokens": 200, "seed": 1}
        shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        said = post("/v1/chat/completions", **chat, response_format=shape)["choices"][0]["message"]["content"]
        assert json.loads(said)["a"] in (1, 2)
        shape["json_schema"]["schema"] = {"anyOf": []}
        assert post("/v1/chat/completions", 400, **chat, response_format=shape)["error"]["param"] == "response_format"
        body = {"prompt": "a", "max_tokens": 3, "logprobs": 2, "logit_bias": NO_END}
        scores = post("/v1/completions", **body)["choices"][0]["logprobs"]
        assert [logprob < 0 for logprob in scores["token_logprobs"]] == [True] * 3

        post("/v1/completions", prompt="abc", max_tokens=3, session_id="text", logit_bias=NO_END)
        post("/v1/chat/completions", **chat, session_id="talk")
        for name in ("text", "talk"):
            post("/v1/states", name=name, session_id=name)
            post("/v1/completions", prompt="", max_tokens=1, state=name)
        post("/v1/states", name="copy", fork="talk")
        assert [one["id"] for one in http.get("/v1/states").json()["data"]] == ["copy", "talk", "text"]
        assert http.delete("/v1/states/copy").status_code == 200
        post("/v1/states/copy/load", 404, session_id="other")
        post("/v1/states/talk/load", session_id="other")
        vector = post("/v1/embeddings", input="hello")["data"][0]["embedding"]
        assert sum(x * x for x in vector) == pytest.approx(1)
        assert 'heron_open_sequences{model="tiny"} 0.0' in http.get("/metrics").text
        assert http.get("/ready").status_code == 200


def test_a_client_that_leaves_frees_its_place(served):
    endless(served.address).close()
    until(lambda: 'open_sequences{model="tiny"} 0.0' in httpx.get(f"{served.address}/metrics").text)


def test_a_signal_for_the_process_of_http_alone_ends_nothing(served):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(served.http, number)
    assert httpx.get(f"{served.address}/health").json() == {"status": "ok"}


def test_where_the_engine_is_killed_http_ends(path):
    served = Served(path)
    served.process.kill()
    code, lines = served.ended()
    assert code == -signal.SIGKILL
    assert lines == ["heron: the engine's process has ended, and with it the server"]


def test_where_http_is_killed_the_engine_ends(path):
    served = Served(path)
    stream = endless(served.address)
    os.kill(served.http, signal.SIGKILL)
    code, lines = served.ended()
    assert code == 1
    assert lines == ["heron: the process that speaks HTTP was ended by signal 9; start the server again"]
    stream.close()


def test_the_answer_to_a_question_that_nobody_waits_for_is_no_other_questions():
    asked = []

    async def main():
        link = _Link(types.SimpleNamespace(send=asked.append))
        link.start(lambda engine, drawn: None)
        first = asyncio.create_task(link.ask(Engines.saved_states))
        await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        second = asyncio.create_task(link.ask(Engines.saved_states))
        await asyncio.sleep(0)
        for call, answer in zip(asked, (["late"], ["right"]), strict=True):
            link.take(_Answer(call.number, answer))
        return await second

    assert asyncio.run(main()) == ["right"]
