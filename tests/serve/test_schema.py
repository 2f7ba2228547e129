"""Requests made from the server's own description of itself, and hostile ones: none may be answered with 5xx."""

from __future__ import annotations

import random

import pytest

from heron.generation import Request
from tests.serve.hostile import HOSTILE, failure
from tests.serve.running import running
from tests.serve.schema_cases import server_errors


@pytest.fixture(scope="module")
def bounded(engine_of):
    """The address of a server whose answers are short."""
    with running(engine_of(), max_answer=8) as address:
        yield address


def test_no_request_that_the_schema_allows_is_answered_5xx(bounded):
    assert server_errors(bounded, 160) == []


def test_a_server_that_fails_is_found(engine_of, monkeypatch):
    monkeypatch.setattr(Request, "check", lambda *_: 1 / 0)
    with running(engine_of(1), max_answer=8) as address:
        assert server_errors(address, 32)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_answered_4xx_or_not_at_all(bounded, name):
    for seed in range(8):
        assert failure(bounded, name, random.Random(seed)) is None
