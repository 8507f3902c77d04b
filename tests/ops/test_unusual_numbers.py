"""Numbers that no kernel can hold, and those of float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INF
from crossfade import ops
from crossfade.ops import native
from every_op import EACH, LENGTHS, TARGETS, floats, fresh, result

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the kernels are not built"
)


# ---- Numbers that no kernel can hold -------------------------------------------------------------

HUGE = [2**31, 2**63, 2**64, 2**70, -(2**70), 10**400]


@pytest.mark.parametrize("x", HUGE, ids=lambda x: f"{x:.3e}" if abs(x) < 2**80 else "10^400")
def test_huge_integers(x: int) -> None:
    """Each call gives a result, or an error that names the argument."""
    z, query, cache = floats(2, 9), floats(2, 2, 1, 8), floats(2, 1, 5, 8)
    new = query[:, :1]

    def draw(**changes: Any) -> Any:
        return ops.blend_sample([z], [1.0], **{"seed": 0, "step": 0, **changes})

    def attended(**changes: Any) -> Any:
        given = {"scale": 1.0, **changes}
        return ops.attend_(query, new, new, cache.clone(), cache.clone(), LENGTHS, **given)

    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: draw(**{name: x})
        for name in (
            *("seed", "stream", "step", "top_k", "temperature", "top_p", "min_p"),
            *("power", "vocab_size"),
        )
    }
    calls |= {
        "Support.top_k": lambda: draw(support=ops.Support(top_k=x)),
        "upport.term": lambda: draw(support=ops.Support(term=x)),
        "window": lambda: attended(window=x),
        "scale": lambda: attended(scale=x),
        "softcap": lambda: attended(softcap=x),
        "ignore_index": lambda: ops.linear_logp(z, z, TARGETS % 2, ignore_index=x),
        "width": lambda: ops.chunk_select(z, z > 0, x),
        "start": lambda: ops.fork_cache_([cache.clone()], LENGTHS * 0, x),
        "end": lambda: ops.fork_cache_([cache.clone()], LENGTHS * 0, 0, x),
        "weights": lambda: ops.blend([z], [x]),
    }
    for name, call in calls.items():
        said = error_of(call)
        assert said is None or (name in said and "must" in said)


def error_of(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("changes", [{"scale": INF}, {"scale": "1"}, {"window": 1.0}], ids=str)
def test_settings_of_attention(changes: dict[str, Any]) -> None:
    query, cache = floats(2, 2, 1, 8), floats(2, 1, 5, 8)
    given = {"scale": 1.0, **changes}
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(changes))} is .*; it must be"):
        ops.attend_(query, query[:, :1], query[:, :1], cache, cache.clone(), LENGTHS, **given)


# ---- float64 -------------------------------------------------------------------------------------


@EACH
def test_float64(op: str) -> None:
    """Models of float64 run: in float64, or rounded for a blend, whose results are float32."""
    call, tensors = fresh(op)
    got = call(*(t.double() if t.shape != (2, 3) else t for t in tensors))
    want = result(op)
    torch.testing.assert_close(got, want, check_dtype=False)
    blended = op.startswith("blend") or not want.is_floating_point()
    assert got.dtype == (want.dtype if blended else torch.float64)


def test_float64_keeps_its_digits() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 0.0]], dtype=torch.float64)
    assert ops.chunk_select(scores, scores > 9, 2).tolist() == [[1, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"scores has dtype torch\.float64"):
        ops.chunk_select(scores, scores > 9, 2, backend="native")
    x, w = floats(2, 9).double(), floats(5, 9).double()
    torch.testing.assert_close(ops.linear(x, w), x @ w.T, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        ops.linear(x, w, backend="native")
    query, cache = floats(2, 2, 1, 8).double(), floats(2, 1, 5, 8).double()
    new = query[:, :1]
    out = ops.attend_(query, new, new, cache.clone(), cache.clone(), LENGTHS, scale=0.4)
    seen = cache[:1, :, :2].clone()
    seen[:, :, 1] = new[0, :, 0]
    want = (0.4 * query[0] @ seen[0].mT).softmax(-1) @ seen[0]
    torch.testing.assert_close(out[0], want.transpose(0, 1), rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"query has dtype torch\.float64"):
        ops.attend_(query, new, new, cache, cache.clone(), LENGTHS, scale=0.4, backend="native")
