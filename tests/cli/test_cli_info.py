"""``crossfade info``: as JSON and for people."""

from __future__ import annotations

import json

import torch


def test_info_says_what_works(run) -> None:
    (found,) = (run("info", "--json", lines=False),)
    found = json.loads(found)
    assert found["packages"]["torch"] == torch.__version__
    assert found["backends"]["cpu"]["reference"] is None
    assert set(found["backends"]["cpu"]) == {"reference", "native", "triton"}
    text = run("info", lines=False)
    assert "reference on cpu" in text
    assert "works" in text
