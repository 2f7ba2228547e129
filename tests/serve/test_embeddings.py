"""/v1/embeddings: how long it may take, how many may wait, and what becomes of it when the client leaves."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

from heron.generation import Engine
from tests.serve.running import raw, request_of, until

MANY = {"input": ["a"] * 200}


@pytest.fixture
def slow(monkeypatch):
    """The texts that an engine has made vectors of; each takes a while."""
    embed, texts = Engine.embed, []

    def slowly(engine, prompt):
        texts.append(prompt)
        time.sleep(0.02)
        return embed(engine, prompt)

    monkeypatch.setattr(Engine, "embed", slowly)
    return texts


def test_a_client_that_leaves_has_no_more_texts_read(serve, engine_of, slow):
    connection = raw(serve(engine_of(1)), request_of(MANY, "/v1/embeddings"))
    until(lambda: len(slow) > 1)
    connection.close()
    time.sleep(0.1)
    n = len(slow)
    time.sleep(0.2)
    assert n == len(slow) < 200


def test_texts_that_take_too_long_are_answered_408(serve, engine_of, slow):
    answer = httpx.post(f"{serve(engine_of(1), timeout=0.1)}/v1/embeddings", json=MANY, timeout=60)
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "timeout"
    assert len(slow) < 50


def test_one_more_than_may_wait_is_told_to_come_again(serve, engine_of, slow):
    address = serve(engine_of(1), queue=0)
    first = threading.Thread(
        target=lambda: httpx.post(f"{address}/v1/embeddings", json={"input": ["a"] * 40}, timeout=60)
    )
    first.start()
    until(lambda: slow)
    answers = [httpx.post(f"{address}/v1/embeddings", json={"input": "b"}, timeout=60) for _ in range(3)]
    first.join()
    assert 429 in {answer.status_code for answer in answers}  # between two texts there is room for one
    assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 429} == {"1"}
