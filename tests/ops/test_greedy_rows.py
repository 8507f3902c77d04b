"""A row of temperature 0 is greedy, whatever the others are: greedy and sampled rows share a batch.

Each row comes out as it does alone: a greedy one with `do_sample=False`, to the last bit.
"""

from typing import Any

import pytest
import torch
from batches import ROWS, assert_rows, batch, pick_rows, settings, take, tensors
from cases import INF, NAN, Backend, assert_samples_agree
from crossfade.ops import BlendSample, Support
from sweeps import product

TEMPERATURES = (0.0, 0.7, -0.0, 1.3, 1.0, 0.0)
GREEDY = [b for b, t in enumerate(TEMPERATURES) if t == 0]
SAMPLED = [b for b, t in enumerate(TEMPERATURES) if t != 0]
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def mixed(device: str, power: float = 0.0, **others: Any) -> dict[str, Any]:
    own = settings(ROWS, device, power)
    return {**own, "temperature": torch.tensor(TEMPERATURES, device=device), **others}


def assert_same_bits(got: BlendSample, want: BlendSample) -> None:
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("cut", "power", "support"),
    product(
        [{}, OFF, {**OFF, "top_k": 5}, {**OFF, "top_p": 0.5}],
        [0.0, 1.0],
        [None, Support(term=1, top_k=60)],
        together=1,
    ),
    ids=str,
)
def test_rows_are_as_alone(
    backend: Backend, cut: dict[str, Any], power: float, support: Support | None
) -> None:
    p, chosen = batch(backend, power), mixed(backend.device, power, **cut)
    p.options["support"] = support
    whole = assert_samples_agree(backend, p, **chosen)
    assert (whole.tokens >= 0).all()
    assert whole.sampled_logprobs[GREEDY].tolist() == [0.0] * len(GREEDY)
    part, own = take(p, chosen, GREEDY)
    alone = backend.blend_sample(*part.args, **part.options, **{**own, "do_sample": False})
    assert_same_bits(pick_rows(whole, GREEDY), alone)
    for b in (GREEDY[0], SAMPLED[0]):
        part, own = take(p, chosen, [b])
        assert_rows(backend.blend_sample(*part.args, **part.options, **own), whole, [b])


@pytest.mark.parametrize(
    ("zero", "cut"),
    product([0.0, 0, -0.0, 1e-60], [OFF, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}], together=1),
    ids=repr,
)
def test_one_temperature_for_all(backend: Backend, zero: float, cut: dict[str, Any]) -> None:
    """As a number (1e-60 is 0 in float32) and as tensors of any dtype."""
    p, chosen = batch(backend), mixed(backend.device, **cut)
    want = backend.blend_sample(*p.args, **p.options, **chosen | {"do_sample": False})
    on = {"device": backend.device}
    for t in (zero, torch.tensor(zero, **on), torch.full((ROWS,), zero, dtype=torch.float64, **on)):
        got = backend.blend_sample(*p.args, **p.options, **chosen | {"temperature": t})
        assert_same_bits(got, want)


@pytest.mark.parametrize("cut", [OFF, {**OFF, "top_k": 40}], ids=["off", "on"])
def test_ties_go_to_the_lowest_id(backend: Backend, cut: dict[str, Any]) -> None:
    """Of a tie a kernel reads some tokens at once and others later. Scores go up to 1e30."""
    z = torch.zeros(4, 4200, device=backend.device)
    z[0, [17, 1500, 4199]] = 1.0
    z[1, [4100, 4199]] = 1e30
    z[2] = -INF
    z[2, [2047, 2048]] = -3e38
    t = torch.tensor([0.0, 0.0, 0.0, 1.0], device=backend.device)
    out = backend.blend_sample([z], [1.0], temperature=t, seed=1, step=2, **cut)
    assert out.tokens[:3].tolist() == [17, 4100, 2047]
    assert out.sampled_logprobs[:3].tolist() == [0.0] * 3


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_settings_of_greedy_rows_are_not_read(backend: Backend, name: str) -> None:
    """A setting that spoils a sampled row leaves a greedy row as it was."""
    p = batch(backend)
    plain = mixed(backend.device, top_k=0, top_p=1.0, min_p=0.0)
    want = backend.blend_sample(*p.args, **p.options, **plain)
    bad = torch.tensor([-1 if name == "top_k" else NAN] * ROWS, device=backend.device)
    got = backend.blend_sample(*p.args, **p.options, **plain | {name: bad})
    assert (got.tokens < 0).nonzero()[:, 0].tolist() == SAMPLED
    assert_rows(pick_rows(got, GREEDY), want, GREEDY)


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_bad_rows_stay_bad(backend: Backend, junk: float) -> None:
    p, chosen = batch(backend), mixed(backend.device)
    p.logits[0][GREEDY[1]] = junk
    out = backend.blend_sample(*p.args, **p.options, **chosen)
    assert (out.tokens < 0).nonzero()[:, 0].tolist() == [GREEDY[1]]
    assert out.sampled_logprobs.isnan().nonzero()[:, 0].tolist() == [GREEDY[1]]


DTYPES = {
    "temperature": (torch.float64, torch.bfloat16, torch.float16),
    "top_p": (torch.float64,),
    "min_p": (torch.float64,),
    "top_k": (torch.int32, torch.int16),
    "seed": (torch.int32, torch.uint8),
    "step": (torch.int32, torch.int8),
}


@pytest.mark.parametrize("name", DTYPES)
def test_settings_of_other_dtypes(backend: Backend, name: str) -> None:
    """Settings may have any dtype of floats or of integers, and any stride."""
    p, chosen = batch(backend), mixed(backend.device, top_p=0.95, min_p=0.01)
    exact = {"temperature": [0.0, 0.5, 0.0, 1.25, 2.0, 0.0], "top_p": 0.75, "min_p": 0.125}
    if name in exact:
        chosen[name] = torch.tensor(exact[name], device=backend.device).expand(ROWS)
    want = backend.blend_sample(*p.args, **p.options, **chosen)
    for dtype in DTYPES[name][: 1 if backend.interpreted else None]:
        own = chosen[name].to(dtype)
        strided = torch.stack([own, own], dim=1)[:, 0]
        got = backend.blend_sample(*p.args, **p.options, **chosen | {name: strided})
        assert_same_bits(got, want)


def test_whole_temperatures(backend: Backend) -> None:
    p, chosen = batch(backend), settings(ROWS, backend.device)
    whole = torch.tensor([0, 1, 2, 0, 1, 0], device=backend.device)
    got = backend.blend_sample(*p.args, **p.options, **chosen | {"temperature": whole})
    want = backend.blend_sample(*p.args, **p.options, **chosen | {"temperature": whole.float()})
    assert_same_bits(got, want)
    assert (got.sampled_logprobs == 0).tolist() == [t == 0 for t in whole.tolist()]
