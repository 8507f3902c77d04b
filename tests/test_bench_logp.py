"""The log-prob bench: every contender has the same gradients, and its products are what it says."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import logp
import logp_contenders
from crossfade.bench import timing

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIZES = [
    pytest.param(logp.Sizes(20, 8, 60, device, dtype), id=f"{device}-{dtype}")
    for device in DEVICES
    for dtype in ("float32", "bfloat16")
]
CONTENDERS = [
    (kind, name)
    for kind in logp.KINDS
    for name in logp.contenders(kind, logp.Sizes(20, 8, 60, DEVICES[-1]))
    if name != "Liger's, compiled"  # it compiles for half a minute
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("kind", "name"), CONTENDERS)
def test_contenders_agree(kind: str, name: str, sizes: logp.Sizes) -> None:
    if name not in logp.contenders(kind, sizes):
        pytest.skip("for GPUs")
    if sizes.dtype == "bfloat16" and sizes.device == "cpu" and name != "ours":
        pytest.skip("a peer's own matter")
    logp.check(kind, sizes, name)


@pytest.mark.parametrize("kind", logp.KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_bare_products(kind: str, device: str) -> None:
    """They take logits z for the gradients by them: z W for hidden, z^T h for a trained head."""
    case = logp.case_of(kind, logp.Sizes(20, 8, 60, device))
    hidden, weight = case.hidden.detach(), case.weight.detach()
    of_hidden, of_weight = logp.products(case)
    z = hidden @ weight.T
    torch.testing.assert_close(of_hidden, z @ weight)
    if kind == "frozen":
        assert of_weight is None
    else:
        torch.testing.assert_close(of_weight, z.T @ hidden)


def measured(monkeypatch: pytest.MonkeyPatch, took: dict[str, float]) -> dict[str, Any]:
    """What is measured where each contender takes so many seconds, and the n-th products n."""
    sizes = logp.Sizes(20, 8, 60)
    ways = logp.contenders("frozen", sizes)
    made = 0

    def seconds(call: functools.partial, device: str) -> float:
        nonlocal made
        if call.func is logp.products:
            made += 1
            return float(made)
        loss = call.args[0]
        return took.get(next(n for n, way in ways.items() if way is loss), 1000.0)

    monkeypatch.setattr(logp, "contenders", lambda *_: ways)
    monkeypatch.setattr(logp, "check", lambda *_: None)
    monkeypatch.setattr(logp, "memory_apart", lambda *_: None)
    monkeypatch.setattr(logp, "seconds", seconds)
    found = logp.measure("frozen", sizes, rounds=1)
    assert made == 2 * (len(ways) + 1)  # two rounds, the first of which does not count
    return found


def test_products_are_beside_what_they_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before and after ours, the first contender, count for ours, and so on."""
    found = measured(monkeypatch, {})
    first = len(found["over_products"]) + 2  # of the second round's products
    assert next(iter(found["over_products"])) == "ours"
    assert found["seconds"]["products"] == first + 0.5
    for i, ratio in enumerate(found["over_products"].values()):
        assert ratio == round(1000 / (first + i + 0.5), 3)


def test_what_beats_the_products_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is ours; a peer may do without a product."""
    measured(monkeypatch, {"naive": 1.0})
    with pytest.raises(timing.FasterThanItsFloor, match="frozen head: 'ours' takes"):
        measured(monkeypatch, {"ours": 1.0})


def test_dpo_by_hand() -> None:
    """The loss is the mean of -log sigmoid(0.1 (chosen - rejected)) over both pairs."""
    logp_of = torch.tensor([-1.0, -2.0, -3.0, -4.0, -2.0, -2.0, -9.0, -4.0])
    deltas = torch.tensor([-3.0 + 4.0, -7.0 + 13.0])
    want = torch.log1p(torch.exp(-0.1 * deltas)).mean()
    torch.testing.assert_close(logp_contenders.dpo_of(logp_of), want)


def row(head: str) -> dict:
    return {
        "head": head,
        "products": logp.KINDS[head],
        "seconds": {"products": 0.5, "ours": 0.6},
        "over_products": {"ours": 1.2},
        "memory_mb": {"ours": None},
    }


def test_summary_of_a_cpu() -> None:
    """A report without a device in its sizes is of a CPU."""
    report = {
        "command": "python bench/logp.py",
        "machine": {"device": "a CPU", "threads": 2},
        "sizes": {"tokens": 2048, "hidden": 576, "vocab": 49152},
        "rows": [row("trained"), row("frozen")],
    }
    lines = logp.render(report).splitlines()
    assert lines[2] == "| trained | 4 products in tiles | 0.50 | 1.00 | - |"
    assert lines[5] == "| frozen | ours | 0.60 | 1.20 | - |"
    assert lines[-1] == (
        "2,048 tokens, hidden 576, vocabulary 49,152, float32; a CPU, 2 threads; "
        "`python bench/logp.py`."
    )


def test_summary_of_a_gpu() -> None:
    """It is in milliseconds, has a table for DPO, and names the peers that are not installed."""
    sizes = {"tokens": 8, "hidden": 4, "vocab": 16, "device": "cuda", "dtype": "bfloat16"}
    report = {
        "command": "c",
        "machine": {"device": "a GPU", "cuda": "13.0"},
        "missing": ["Liger", "cut-cross-entropy"],
        "sizes": sizes,
        "rows": [row("trained"), row("dpo")],
    }
    lines = logp.render(report).splitlines()
    assert lines[3] == "| trained | ours | 600.00 | 1.20 | - |"
    assert lines[4] == ""
    assert lines[5].startswith("| head, DPO loss | contender | ms |")
    assert lines[7] == "| trained | 4 products | 500.00 | 1.00 | - |"
    assert lines[-1].endswith(
        "bfloat16; a GPU, CUDA 13.0; `c`. Not installed: Liger, cut-cross-entropy."
    )
