"""A server on a tiny model, in a thread of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import httpx
import openai
import pytest

from heron import tokenizer
from heron.generation import Engine
from tests.serve.running import running


@pytest.fixture(scope="session")
def engine_of(random_model) -> Callable[..., Engine]:
    """A function: number of places and ModelConfig fields -> an engine over bytes."""
    return lambda rows=8, **changes: Engine(random_model(vocab_size=256, **changes), tokenizer.load("bytes"), rows)


@pytest.fixture
def serve() -> Generator[Callable[..., str]]:
    """A function: an engine and settings -> the address of its server, which ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda engine, *more, **settings: stack.enter_context(running(engine, *more, **settings))


@pytest.fixture(scope="module")
def shared(engine_of) -> Generator[str]:
    """The address of one server for the tests of a file."""
    with running(engine_of()) as address:
        yield address


@pytest.fixture(scope="module")
def client(shared) -> Generator[openai.OpenAI]:
    """OpenAI's own client, that asks once."""
    with openai.OpenAI(base_url=f"{shared}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(shared) -> Generator[httpx.Client]:
    with httpx.Client(base_url=shared, timeout=30) as http:
        yield http
