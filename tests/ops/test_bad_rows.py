"""What only the device sees makes a row bad: token -1 and NaN, the same on every backend.

No other row changes, and what a row does not use cannot make it bad.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import tensors
from cases import INF, NAN, Backend, good_call, lay_out
from crossfade.ops import Support
from sweeps import product
from torch import Tensor

ROWS, TERMS, VOCAB = 3, 2, 8  # of good_call
Change = Callable[[dict[str, Any]], None]  # of a call's arguments, in place
ROW = 1  # the row that is made bad


def at(
    argument: str, *place: int, to: Any, k: int | None = None
) -> Callable[[dict[str, Any]], None]:
    """Writes `to` into row ROW of an argument (or of its tensor k), at `place` or everywhere."""

    def write(call: dict[str, Any]) -> None:
        x = call[argument] if k is None else call[argument][k]
        x[(ROW, *place)] = to

    return write


def everything_out(call: dict[str, Any]) -> None:
    """The support leaves one token, which the mask removes."""
    call["support"] = Support(top_k=1)
    call["mask"][ROW, call["logits"][0][ROW].argmax()] = False


def cut_from_nothing(to: float) -> Change:
    """The support's term has no weight, but is no distribution, so nothing can be cut from it."""

    def write(call: dict[str, Any]) -> None:
        call["support"] = Support(term=1, min_p=0.1)
        call["weights"][ROW] = torch.tensor([1.0, 0.0])
        at("logits", to=to, k=1)(call)

    return write


def in_turn(call: dict[str, Any]) -> None:
    """Each token is removed by one term or the other."""
    call["logits"][0][ROW, ::2] = -INF
    call["logits"][1][ROW, 1::2] = -INF


def overflow(call: dict[str, Any]) -> None:
    call["logits"][0][ROW, 3] = 3e38
    call["weights"][ROW, 0] = 5.0


BAD_ROWS: dict[str, Change] = {
    "logits NaN": at("logits", 3, to=NAN, k=0),
    "logits NaN, second term": at("logits", 7, to=NAN, k=1),
    "logits all NaN": at("logits", to=NAN, k=0),
    "logits +inf": at("logits", 3, to=INF, k=1),
    "logits all -inf": at("logits", to=-INF, k=1),
    "no token in both terms": in_turn,
    "values NaN": at("values", 3, to=NAN, k=0),
    "values +inf": at("values", 3, to=INF, k=0),
    "values all -inf": at("values", to=-INF, k=0),
    "mask empty": at("mask", to=False),
    "mask and support empty": everything_out,
    "support of a term that is all -inf": cut_from_nothing(-INF),
    "support of a term that is all +inf": cut_from_nothing(INF),
    "weights NaN": at("weights", 0, to=NAN),
    "weights inf": at("weights", 1, to=INF),
    "weights that overflow": overflow,
    "value_weights NaN": at("value_weights", 0, to=NAN),
    "value_weights -inf": at("value_weights", 0, to=-INF),
}
BAD_MEANS: dict[str, Change] = {
    **{name: bad for name, bad in BAD_ROWS.items() if name != "weights that overflow"},
    "weights negative": at("weights", to=torch.tensor([1.5, -0.5])),
    "weights sum to 1.1": at("weights", to=torch.tensor([0.6, 0.5])),
    "weights all zero": at("weights", to=0.0),
}
del BAD_MEANS["no token in both terms"]  # a mixture has mass wherever one of its terms has
BAD_SETTINGS: dict[str, tuple[str, float]] = {
    "temperature negative": ("temperature", -1.0),
    "temperature NaN": ("temperature", NAN),
    "temperature inf": ("temperature", INF),
    "top_k negative": ("top_k", -1),
    "top_p negative": ("top_p", -0.1),
    "top_p above one": ("top_p", 1.1),
    "top_p NaN": ("top_p", NAN),
    "min_p negative": ("min_p", -0.1),
    "min_p above one": ("min_p", 1.1),
    "min_p NaN": ("min_p", NAN),
}


def in_tensors(device: str, power: float = 0.0) -> dict[str, Any]:
    """A good call in which each row has weights, a mask and settings of its own."""
    call = good_call(device)
    call |= {"power": power, "support": None, "parts": (), "return_pushes": power == 0}
    for name in ("weights", "value_weights"):
        call[name] = torch.tensor([call[name]] * ROWS, device=device)
    call["mask"] = call["mask"].repeat(ROWS, 1)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        call[name] = torch.tensor([call[name]] * ROWS, device=device)
    return call


def blend_part(call: dict[str, Any]) -> dict[str, Any]:
    names = good_call("cpu", sample=False)
    return {name: x for name, x in call.items() if name in names}


@functools.cache
def without_fault(backend: Backend, power: float, support: Support | None) -> tuple[Any, Tensor]:
    call = in_tensors(backend.device, power) | {"support": support}
    return backend.blend_sample(**call), backend.blend(**blend_part(call))


def assert_bad_row(backend: Backend, call: dict[str, Any]) -> None:
    out = backend.blend_sample(**call)
    want, _ = without_fault(backend, call["power"], call["support"])
    assert out.tokens.tolist() == [-1 if b == ROW else want.tokens[b] for b in range(ROWS)]
    for got, good_rows in zip(tensors(out)[1:], tensors(want)[1:], strict=True):
        assert got[ROW].isnan().all()
        torch.testing.assert_close(got[::2], good_rows[::2])


@pytest.mark.parametrize(
    ("power", "case"),
    [
        *product([0.0, 1.0], [case for case in BAD_ROWS if case in BAD_MEANS], together=1),
        *((0.0, case) for case in BAD_ROWS if case not in BAD_MEANS),
        *((1.0, case) for case in BAD_MEANS if case not in BAD_ROWS),
        *((INF, case) for case in ("logits NaN", "weights negative", "weights sum to 1.1")),
        *((-INF, case) for case in ("logits +inf", "weights all zero")),
    ],
)
def test_bad_row(backend: Backend, power: float, case: str) -> None:
    call = in_tensors(backend.device, power)
    (BAD_MEANS if power else BAD_ROWS)[case](call)
    assert_bad_row(backend, call)
    log_p = backend.blend(**blend_part(call))
    assert log_p.isnan().all(dim=-1).tolist() == [b == ROW for b in range(ROWS)]
    _, want = without_fault(backend, power, call["support"])
    torch.testing.assert_close(log_p[::2], want[::2])
    greedy = backend.blend_sample(**{**call, "do_sample": False})
    assert (greedy.tokens < 0).tolist() == [b == ROW for b in range(ROWS)]
    assert greedy.sampled_logprobs.tolist()[::2] == [0.0, 0.0]


def test_an_intersection_of_terms_without_a_common_token(backend: Backend) -> None:
    """It leaves nothing, where the union of the same terms has all of their tokens."""
    call = in_tensors(backend.device, -INF)
    in_turn(call)
    assert_bad_row(backend, call)
    both = backend.blend(**{**blend_part(call), "power": INF, "mask": None})
    assert both[ROW].isfinite().all()


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting_of_a_row(backend: Backend, case: str) -> None:
    name, value = BAD_SETTINGS[case]
    call = in_tensors(backend.device)
    call[name][ROW] = value
    assert_bad_row(backend, call)
    greedy = backend.blend_sample(**{**call, "do_sample": False})
    assert (greedy.tokens >= 0).all(), "greedy decoding reads no setting"


def test_every_row_bad(backend: Backend) -> None:
    call = good_call(backend.device)
    call["mask"] = torch.zeros(VOCAB, dtype=torch.bool, device=backend.device)
    assert backend.blend_sample(**call).tokens.tolist() == [-1] * ROWS
    assert backend.blend(**blend_part(call)).isnan().all()


def weightless(call: dict[str, Any]) -> None:
    call["weights"][ROW] = torch.tensor([0.0, 1.0])
    call["logits"][0][ROW] = NAN


def valueless(call: dict[str, Any]) -> None:
    call["value_weights"][ROW] = 0.0
    call["values"][0][ROW, ::2] = -INF
    call["values"][0][ROW, 1] = NAN


def junk_that_is_masked(call: dict[str, Any]) -> None:
    call["mask"][ROW, 2:5] = False
    for k, junk in enumerate((NAN, INF, -INF)):
        call["logits"][0][ROW, 2 + k] = junk


def padding(call: dict[str, Any]) -> None:
    call["logits"] = [lay_out(z, "padded", extra=4) for z in call["logits"]]
    call["values"] = [lay_out(q, "padded", extra=2) for q in call["values"]]


def one_token(call: dict[str, Any]) -> None:
    call["mask"][ROW] = torch.arange(VOCAB, device=call["mask"].device) == 5


FINE: dict[str, Change] = {
    "NaN under a weight of 0": weightless,
    "values under a weight of 0": valueless,
    "NaN and +inf at masked tokens": junk_that_is_masked,
    "NaN in padding": padding,
    "one token left": one_token,
}


@pytest.mark.parametrize("case", FINE)
def test_good_row(backend: Backend, case: str) -> None:
    call = in_tensors(backend.device)
    FINE[case](call)
    out = backend.blend_sample(**{**call, "return_term_logprobs": False})
    assert (out.tokens >= 0).all()
    assert torch.stack(out[1:3]).isfinite().all()
    log_p = backend.blend(**blend_part(call))
    assert not log_p.isnan().any()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones_like(log_p[:, 0]))
    if case == "one token left":
        assert (out.tokens[ROW], out.logprobs[ROW], out.sampled_logprobs[ROW]) == (5, 0, 0)


@pytest.mark.parametrize("values", [0, 1])
def test_no_rows(backend: Backend, values: int) -> None:
    """An empty batch gives empty tensors of the right shapes."""
    z = [torch.empty(0, VOCAB, device=backend.device) for _ in range(TERMS)]
    q, weights = ([z[0]], [1.0]) if values else ([], None)
    assert backend.blend(z, [1.0, 2.0], q, weights).shape == (0, VOCAB)
    for do_sample in (True, False):
        out = backend.blend_sample(
            z,
            [1.0, 2.0],
            q,
            weights,
            seed=0,
            step=0,
            do_sample=do_sample,
            return_term_logprobs=True,
            return_pushes=True,
        )
        assert out.tokens.shape == out.logprobs.shape == out.sampled_logprobs.shape == (0,)
        assert out.term_logprobs is not None
        assert out.term_logprobs.shape == (0, TERMS)
        assert out.pushes is not None
        assert out.pushes.shape == (0, TERMS + values)
        assert out.tokens.dtype == torch.int64
