"""Requests that schemathesis makes from the server's description of itself."""

from __future__ import annotations

import hypothesis
import schemathesis


def server_errors(address: str, cases: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many requests were made, `cases` of each route, and those that were answered 5xx."""
    found, n_made = [], 0
    for result in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation = result.ok()

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            nonlocal n_made
            n_made += 1
            answer = case.call(base_url=address, timeout=60)
            if answer.status_code >= 500:
                found.append(f"{answer.status_code} {case.as_curl_command()[:300]}")

        ask()
    return n_made, found
