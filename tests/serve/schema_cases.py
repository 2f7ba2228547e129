"""Requests that schemathesis makes from the server's description of itself."""

from __future__ import annotations

import hypothesis
import schemathesis


def server_errors(address: str, cases: int, seed: int = 0) -> list[str]:
    """Those of `cases` requests, spread over the routes, that were answered 5xx."""
    found, n_made = [], 0
    operations = [
        result.ok() for result in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations()
    ]
    while n_made < cases:  # a route without a parameter has one request
        seed, of_each = seed + 1, -(-(cases - n_made) // len(operations))
        for operation in operations:
            n_made += _asked(operation, address, min(of_each, cases - n_made), seed, found)
    return found


def _asked(operation, address: str, cases: int, seed: int, found: list[str]) -> int:
    """The number of requests made of one route, `cases` at most."""
    n_made = 0
    if cases:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases, deadline=None, database=None, verbosity=hypothesis.Verbosity.quiet,
            suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            nonlocal n_made
            n_made += 1
            answer = case.call(base_url=address, timeout=60)
            if answer.status_code >= 500:
                found.append(f"{answer.status_code} {case.as_curl_command()[:300]}")

        ask()
    return n_made
