"""Bodies, queries and headers made up from the server's own schema: no 500, no hang, errors in one form.

`DIPTYCH_FUZZ_CASES=5000` runs the long version.
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.runtime.serving.running import OPERATOR, PATIENCE, Running

CASES = int(os.environ.get("DIPTYCH_FUZZ_CASES", "200"))
EVERYTHING_STOPS = ("/admin/pause", "/admin/drain")
"""What takes no arguments and would leave the others waiting."""


def test_nothing_that_the_schema_allows_or_forbids_breaks_the_server(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = [operation.ok() for operation in schema.get_all_operations()]
    operations = [operation for operation in found if operation.path not in EVERYTHING_STOPS]
    with_arguments = [operation for operation in operations if _takes_arguments(operation)]
    assert len(operations) > 15
    assert len(with_arguments) >= 7
    seen: dict[int, int] = {}
    for operation in operations:
        _fuzz(operation, CASES // len(with_arguments) if operation in with_arguments else 1, seen)
    assert server.http.get("/health").status_code == 200
    assert server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
    assert sum(seen.values()) > CASES / 2
    assert seen[200] > len(operations) - len(with_arguments)
    assert seen[400] > len(operations)


def _takes_arguments(operation: Any) -> bool:
    return bool(operation.body) or bool(operation.query) or bool(operation.path_parameters)


def _fuzz(operation: Any, count: int, seen: dict[int, int]) -> None:
    cases = operation.as_strategy(schemathesis.GenerationMode.POSITIVE)
    if _takes_arguments(operation):
        cases = st.one_of(cases, operation.as_strategy(schemathesis.GenerationMode.NEGATIVE))

    @settings(
        max_examples=count, suppress_health_check=list(HealthCheck), database=None, derandomize=True, deadline=None
    )
    @hypothesis.given(cases)
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and sum(seen.values()) % 4:
            case.body.pop("model", None)  # any other name than the one ends in 404, and what is behind is not reached
        response = case.call(headers=OPERATOR, timeout=PATIENCE)
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        assert response.status_code not in (500, 502, 504), (case.as_curl_command(), response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["code"] == response.status_code
            assert error["message"]

    run()


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_the_schema_is_published(server: Running, path: str) -> None:
    assert server.http.get(path).status_code == 200
