"""Tiles small enough that a small problem has several, and no warnings of numpy's."""

from collections.abc import Iterator

import numpy as np
import pytest
from crossfade.ops.logp import tiles as logp_tiles

pytest.register_assert_rewrite("heads")


@pytest.fixture(params=[None, (7, 12), (1, 1)], ids=["one tile", "7 x 12", "1 x 1"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns of a tile, at most."""
    if request.param == (1, 1) and request.node.callspec.params["backend"] == "triton":
        pytest.skip("hundreds of programs")
    if request.param is not None:
        monkeypatch.setattr(logp_tiles, "tile_size", lambda device: request.param)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """numpy computes what a GPU would, and warns of NaN and infinities."""
    with np.errstate(all="ignore"):
        yield
