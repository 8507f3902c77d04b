"""One cluster of Ray, on this machine alone, which the tests of a file share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from ray_runs import save_models

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from crossfade.bulk.ray.driver import cluster

    with cluster(2) as ray:
        yield ray
