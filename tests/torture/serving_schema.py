"""Requests made from the server's own description: none is answered 5xx."""

from __future__ import annotations

from heron.generation import Request
from tests.serve.running import running
from tests.serve.schema_cases import server_errors
from tests.torture.result import Result
from tests.torture.serving import engine_of


def run(trials: int, seed: int) -> Result:
    """`trials` requests, spread over the routes."""
    with running(engine_of(8), max_answer=8) as address:
        failures = server_errors(address, trials, seed)
    check = Request.check
    Request.check = lambda *_: 1 / 0  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with running(engine_of(1), max_answer=8) as address:
            caught = bool(server_errors(address, 60, seed))
    finally:
        Request.check = check
    promise = "requests made from the server's own OpenAPI document by schemathesis are never answered 5xx"
    return Result(promise, trials, trials, failures, "a server that fails", int(caught), 1)
