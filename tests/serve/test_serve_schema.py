"""The OpenAPI document is true: schemathesis makes requests by it, right ones and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from servers import Running


@pytest.mark.parametrize("examples", [3, pytest.param(400, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_that_the_document_allows_or_forbids_is_a_fault(
    server: Running, mode: GenerationMode, examples: int
) -> None:
    # A form cannot say which names of blends there are, or which fields exclude each other.
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in document.get_all_operations():
        operation: Any = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # It takes nothing that could be wrong.

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
