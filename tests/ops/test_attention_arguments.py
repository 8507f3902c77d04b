"""Wrong arguments of `ops.attend_` are named, with what they were and must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, case
from crossfade.ops import attend_

Change = Callable[[Case], dict[str, Any]]

BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "dtype": (lambda c: {"query": c.query.long()}, TypeError, "query has dtype torch.int64"),
    "no tensor": (lambda c: {"keys": None}, TypeError, "keys is a NoneType"),
    "mixed": (lambda c: {"keys": c.keys.half()}, TypeError, "keys has dtype torch.float16"),
    "dims": (lambda c: {"query": c.query[0]}, ValueError, r"query has shape \[6, 1, 16\]"),
    "heads": (lambda c: {"query": c.query[:, :5]}, ValueError, "query has 5 heads"),
    "no token": (lambda c: {"query": c.query[:, :, :0]}, ValueError, "n and D must be at least 1"),
    "no slot": (lambda c: {"keys": c.keys[:, :, :0]}, ValueError, "C must be at least 1"),
    "no value": (lambda c: {"value": c.value[..., :0]}, ValueError, "Dv must be at least 1"),
    "key": (lambda c: {"key": c.key[..., :15]}, ValueError, r"key has shape \[3, 2, 1, 15\]"),
    "value": (lambda c: {"value": c.value[:2]}, ValueError, r"value has shape \[2, 2, 1, 16\]"),
    "values": (lambda c: {"values": c.values[:, :, 1:]}, ValueError, "values has shape"),
    "few rows": (lambda c: {"keys": c.keys[:2]}, ValueError, "keys has 2 rows"),
    "stride": (
        lambda c: {"keys": torch.zeros(3, 2, 40, 32)[..., ::2]},
        ValueError,
        "keys has a last stride of 2",
    ),
    "query's": (
        lambda c: {"query": torch.zeros(3, 6, 1, 32)[..., ::2]},
        ValueError,
        "query has a last stride of 2",
    ),
    "device": (lambda c: {"value": c.value.to("meta")}, ValueError, "value is on meta"),
    "lengths": (lambda c: {"lengths": c.lengths.int()}, TypeError, "lengths has dtype"),
    "lengths'": (lambda c: {"lengths": c.lengths[:2]}, ValueError, r"lengths has shape \[2\]"),
    "rows": (lambda c: {"rows": c.lengths[:1]}, ValueError, r"rows has shape \[1\]"),
    "window": (lambda c: {"window": -1}, ValueError, "window is -1"),
    "softcap": (lambda c: {"softcap": -0.5}, ValueError, "softcap is -0.5"),
    "no such": (lambda c: {"backend": "fast"}, ValueError, "backend is 'fast'"),
    "gradient": (
        lambda c: {"query": c.query.clone().requires_grad_(), "backend": "native"},
        ValueError,
        "where a gradient is wanted",
    ),
    "negative": (
        lambda c: {"lengths": torch.tensor([0, -1, 2]), "backend": "native"},
        ValueError,
        r"lengths\[1\] is -1",
    ),
    "row": (
        lambda c: {"rows": torch.tensor([0, 1, 3]), "backend": "native"},
        ValueError,
        r"rows\[2\] is 3; it must be within \[0, 3\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    change, error, message = BAD[name]
    c = case()
    with pytest.raises(error, match=message):
        attend_(**{**c._asdict(), "scale": 1.0, **change(c)})
