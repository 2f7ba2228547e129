"""A server on a tiny model, in a thread of the tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator

import httpx
import openai
import pytest

from heron import tokenizer
from heron.generation import Engine
from heron.serve import ServeConfig, create_app
from heron.serve.server import server_of


@pytest.fixture(scope="session")
def engine_of(random_model) -> Callable[..., Engine]:
    """A function: number of places and ModelConfig fields -> an engine over bytes."""
    return lambda rows=8, **changes: Engine(random_model(vocab_size=256, **changes), tokenizer.load("bytes"), rows)


@contextlib.contextmanager
def running(app, config: ServeConfig = ServeConfig(port=0)) -> Generator[str]:  # noqa: B008 (frozen)
    """The address of a server of `app`."""
    server = server_of(app, config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield server.address
    finally:
        server.should_exit = True
        thread.join()


def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something; fail where it does not come."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@pytest.fixture
def serve() -> Generator[Callable[..., str]]:
    """A function: an engine and settings -> the address of its server."""
    with contextlib.ExitStack() as stack:

        def start(engine, engines={}, states={}, template=None, **settings) -> str:
            config = ServeConfig(**{"port": 0, "name": "tiny", "grace": 1.0, **settings})
            return stack.enter_context(running(create_app(engine, config, engines, states, template), config))

        yield start


@pytest.fixture(scope="module")
def shared(engine_of) -> Generator[str]:
    """The address of one server for the tests of a file."""
    config = ServeConfig(port=0, name="tiny", grace=1.0)
    with running(create_app(engine_of(), config), config) as address:
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
