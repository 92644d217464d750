"""The server against its own OpenAPI: what fits it or nearly does is answered as it says, by no error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from benchmarks.serving.server import Server, serving

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def bounded() -> Iterator[Server]:
    """A server whose answers are short whatever is asked for."""
    with serving("--max-model-len", "24", "--max-requests", "200", threads=1) as running:
        yield running


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_request_is_answered_as_the_schema_says(bounded: Server, mode: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{bounded.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= {each.path for each in operations}
    for operation in operations:

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def answered(case: Any) -> None:
            case.call_and_validate(timeout=60, checks=CHECKS)

        with suppress(Unsatisfiable):  # nothing is wrong for one that takes nothing
            answered()


def test_after_all_that_the_server_is_well(bounded: Server) -> None:
    bounded.wait_until_idle()
    assert httpx.get(f"{bounded.url}/health").json()["status"] == "ok"
    errors = [name for name, value in bounded.metrics().items() if 'status="5' in name and value]
    assert not errors
