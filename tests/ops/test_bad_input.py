"""Bad calls, argument by argument: the same error on every backend, and it names the argument."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import INF, NAN, Backend, good_call, matrices
from crossfade import ops
from crossfade.ops import Support
from torch import Tensor

ROWS, VOCAB = 3, 8  # of good_call


class Bad(NamedTuple):
    argument: str
    value: Any  # or a function of the device
    error: type[Exception]
    says: str  # part of the message
    also: dict[str, Any] = {}  # noqa: RUF012 other arguments of the call

    def __repr__(self) -> str:
        shown = "device" if callable(self.value) else repr(self.value)
        if isinstance(self.value, Tensor):
            shown = f"{str(self.value.dtype)[6:]}{list(self.value.shape)}"
        return f"{self.argument}={' '.join(shown.split())[:50]}"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def with_second(make: Callable[[Tensor], Any]) -> Callable[[str], list[Any]]:
    """A function of the device that gives a good tensor, and one that `make` made of a good one."""
    return lambda device: [(m := matrices(2, device))[0], make(m[1])]


def on_device(make: Callable[[], Tensor]) -> Callable[[str], Tensor]:
    return lambda device: make().to(device)


MEAN = {"power": 1.0}
OF_BLEND = [
    Bad("logits", lambda d: matrices(1, d)[0], TypeError, "logits is a Tensor"),
    Bad("logits", None, TypeError, "logits is a NoneType"),
    Bad("logits", "ab", TypeError, "logits"),
    Bad("logits", [], ValueError, "logits is empty"),
    Bad("logits", lambda d: matrices(17, d), ValueError, "logits has 17", {"weights": [1.0] * 17}),
    Bad("logits", with_second(lambda t: t.tolist()), TypeError, r"logits\[1\] is a list"),
    Bad("logits", with_second(lambda t: t.cfloat()), TypeError, r"logits\[1\] has dtype"),
    Bad("logits", with_second(lambda t: t.long()), TypeError, r"logits\[1\] has dtype torch.int64"),
    Bad("logits", with_second(lambda t: t > 0), TypeError, r"logits\[1\] has dtype torch.bool"),
    Bad("logits", with_second(lambda t: t[0]), ValueError, r"logits\[1\] has shape \[8\]"),
    Bad("logits", with_second(lambda t: t[None]), ValueError, r"logits\[1\] has shape \[1, 3, 8\]"),
    Bad("logits", with_second(lambda t: t[:2]), ValueError, r"logits\[1\] has 2 rows"),
    Bad("logits", with_second(lambda t: t[:, :0]), ValueError, r"logits\[1\] has shape \[3, 0\]"),
    Bad(
        "logits",
        with_second(lambda t: t.repeat(1, 2)[:, ::2]),
        ValueError,
        r"logits\[1\] has column stride 2",
    ),
    Bad("logits", with_second(lambda t: meta(ROWS, VOCAB)), ValueError, r"logits\[1\] is on meta"),
    Bad("weights", None, TypeError, "weights is a NoneType"),
    Bad("weights", 1.0, TypeError, "weights is a float"),
    Bad("weights", "ab", TypeError, "weights is a str"),
    Bad("weights", [1.0], ValueError, "weights has 1 numbers; it must have 2"),
    Bad("weights", [1.0, 2.0, 3.0], ValueError, "weights has 3 numbers"),
    Bad("weights", [1.0, "x"], TypeError, r"weights\[1\] is 'x'"),
    Bad("weights", [True, 1.0], TypeError, r"weights\[0\] is True"),
    Bad("weights", [1.0, NAN], ValueError, r"weights\[1\] is nan"),
    Bad("weights", [INF, 1.0], ValueError, r"weights\[0\] is inf"),
    Bad("weights", on_device(lambda: torch.ones(3)), ValueError, r"weights has shape \[3\]"),
    Bad("weights", on_device(lambda: torch.ones(2, 2)), ValueError, r"weights has shape \[2, 2\]"),
    Bad("weights", on_device(lambda: torch.tensor(1.0)), ValueError, r"weights has shape \[\]"),
    Bad("weights", on_device(lambda: torch.ones(2).long()), TypeError, "weights has dtype"),
    Bad("weights", meta(2), ValueError, "weights is on meta"),
    Bad("weights", [1.5, -0.5], ValueError, r"weights\[1\] is -0.5; with power", MEAN),
    Bad("weights", [0.6, 0.5], ValueError, "weights sum to 1.1", MEAN),
    Bad("weights", [0.0, 0.0], ValueError, "weights sum to 0", {"power": -1}),
    Bad("values", lambda d: matrices(1, d)[0], TypeError, "values is a Tensor"),
    Bad("values", None, TypeError, "values is a NoneType"),
    Bad("values", lambda d: [matrices(1, d)[0].long()], TypeError, r"values\[0\] has dtype"),
    Bad("values", lambda d: [matrices(1, d)[0][:1]], ValueError, r"values\[0\] has 1 rows"),
    Bad("values", lambda d: [matrices(1, d)[0].t()], ValueError, r"values\[0\] has 8 rows"),
    Bad("values", lambda d: matrices(17, d), ValueError, "values has 17 tensors"),
    Bad("values", [meta(ROWS, VOCAB)], ValueError, r"values\[0\] is on meta"),
    Bad("values", [None], TypeError, r"values\[0\] is a NoneType"),
    Bad("values", [], ValueError, "value_weights has 1 numbers; it must have 0"),
    Bad("value_weights", None, ValueError, "value_weights is None; it must have 1"),
    Bad("value_weights", 0.5, TypeError, "value_weights is a float"),
    Bad("value_weights", [0.5, 0.5], ValueError, "value_weights has 2 numbers"),
    Bad("value_weights", [-INF], ValueError, r"value_weights\[0\] is -inf"),
    Bad(
        "value_weights", on_device(lambda: torch.ones(4, 1)), ValueError, "value_weights has shape"
    ),
    Bad("value_weights", meta(1), ValueError, "value_weights is on meta"),
    Bad("power", "1", TypeError, "power is '1'"),
    Bad("power", True, TypeError, "power is True"),
    Bad("power", None, TypeError, "power is None"),
    Bad("power", NAN, ValueError, "power is nan"),
    Bad("power", 10**39, ValueError, "power is 10+; it must be finite as a float32, inf or -inf"),
    Bad("weights", [0.6, 0.5], ValueError, "weights sum to 1.1", {"power": INF}),
    Bad("weights", [1.5, -0.5], ValueError, "-0.5; with power", {"power": -INF}),
    Bad("parts", {"min": 3}, TypeError, "parts is a dict; it must be a list of Part"),
    Bad("support", {"top_k": 3}, TypeError, "support is a dict"),
    Bad("support", 3, TypeError, "support is a int"),
    Bad("support", Support(term=2), ValueError, "support.term is 2; it must be below 2"),
    Bad("mask", [True] * VOCAB, TypeError, "mask is list"),
    Bad("mask", on_device(lambda: torch.ones(VOCAB)), TypeError, "mask is torch.float32"),
    Bad("mask", on_device(lambda: torch.ones(7) > 0), ValueError, r"mask has shape \[7\]"),
    Bad("mask", on_device(lambda: torch.ones(2, 8) > 0), ValueError, r"mask has shape \[2, 8\]"),
    Bad("mask", on_device(lambda: torch.ones(1, 3, 8) > 0), ValueError, "mask has shape"),
    Bad("mask", on_device(lambda: torch.tensor(True)), ValueError, r"mask has shape \[\]"),
    Bad("mask", meta(VOCAB, dtype=torch.bool), ValueError, "mask is on meta"),
    Bad("vocab_size", 0, ValueError, "vocab_size is 0"),
    Bad("vocab_size", -8, ValueError, "vocab_size is -8"),
    Bad("vocab_size", VOCAB + 1, ValueError, r"vocab_size is 9; it must be within \[1, 8\]"),
    Bad("vocab_size", 8.0, TypeError, "vocab_size is a float"),
    Bad("vocab_size", True, TypeError, "vocab_size is a bool"),
    Bad("colour", 1, TypeError, "colour"),
]

OF_SAMPLING = [
    Bad("temperature", -1.0, ValueError, "temperature is -1.0; it must be 0 \\(greedy\\) or above"),
    Bad("temperature", -1e-60, ValueError, "temperature is -1e-60"),
    Bad("temperature", NAN, ValueError, "temperature is nan"),
    Bad("temperature", INF, ValueError, "temperature is inf"),
    Bad("temperature", "1", TypeError, "temperature is '1'"),
    Bad("temperature", None, TypeError, "temperature is None"),
    Bad("temperature", True, TypeError, "temperature is True"),
    Bad("temperature", on_device(lambda: torch.ones(2)), ValueError, "temperature has shape"),
    Bad("temperature", on_device(lambda: torch.ones(3) > 0), TypeError, "temperature has dtype"),
    Bad("temperature", meta(ROWS), ValueError, "temperature is on meta"),
    Bad("top_k", -1, ValueError, "top_k is -1; it must be 0"),
    Bad("top_k", 2**63, ValueError, "top_k is 9223372036854775808"),
    Bad("top_k", 1.5, TypeError, "top_k is 1.5"),
    Bad("top_k", None, TypeError, "top_k is None"),
    Bad("top_k", on_device(lambda: torch.ones(3)), TypeError, "top_k has dtype torch.float32"),
    Bad("top_k", on_device(lambda: torch.ones(4).long()), ValueError, r"top_k has shape \[4\]"),
    Bad("top_p", -0.1, ValueError, "top_p is -0.1; it must be within"),
    Bad("top_p", 1.1, ValueError, "top_p is 1.1"),
    Bad("top_p", NAN, ValueError, "top_p is nan"),
    Bad("top_p", "x", TypeError, "top_p is 'x'"),
    Bad("top_p", on_device(lambda: torch.ones(3, 1)), ValueError, r"top_p has shape \[3, 1\]"),
    Bad("min_p", -0.1, ValueError, "min_p is -0.1"),
    Bad("min_p", 1.5, ValueError, "min_p is 1.5"),
    Bad("min_p", [0.1], TypeError, "min_p is"),
    Bad("min_p", meta(ROWS), ValueError, "min_p is on meta"),
    Bad("do_sample", None, TypeError, "do_sample is None"),
    Bad("do_sample", 1, TypeError, "do_sample is 1"),
    Bad("seed", -1, ValueError, "seed is -1"),
    Bad("seed", 2**64, ValueError, "seed is 18446744073709551616"),
    Bad("seed", 1.0, TypeError, "seed is 1.0"),
    Bad("seed", None, TypeError, "seed is None"),
    Bad("seed", on_device(lambda: torch.ones(3)), TypeError, "seed has dtype"),
    Bad("seed", on_device(lambda: torch.ones(1).long()), ValueError, r"seed has shape \[1\]"),
    Bad("stream", -1, ValueError, "stream is -1"),
    Bad("stream", 2**64, ValueError, "stream is"),
    Bad("stream", 0.5, TypeError, "stream is 0.5"),
    Bad("step", -1, ValueError, "step is -1"),
    Bad("step", 2**32, ValueError, "step is 4294967296"),
    Bad("step", "3", TypeError, "step is '3'"),
    Bad("step", meta(ROWS, dtype=torch.int64), ValueError, "step is on meta"),
    Bad("first_token", 5, ValueError, "first_token is 5 and return_partial is False"),
    Bad("first_token", "5", TypeError, "first_token is '5'"),
    Bad("return_partial", 1, TypeError, "return_partial is 1"),
    Bad("return_term_logprobs", 1, TypeError, "return_term_logprobs is 1"),
    Bad("return_pushes", 1, TypeError, "return_pushes is 1"),
    Bad("return_pushes", True, NotImplementedError, "parts has 1 members; it must be empty"),
    Bad("return_pushes", True, NotImplementedError, "power is 1.0; it must be 0", {"power": 1.0}),
]


def test_call_without_a_fault(backend: Backend) -> None:
    """Without this, the errors below could come from another argument."""
    assert (backend.blend_sample(**good_call(backend.device)).tokens >= 0).all()
    assert not backend.blend(**good_call(backend.device, sample=False)).isnan().any()


@pytest.mark.parametrize("bad", OF_BLEND + OF_SAMPLING, ids=repr)
def test_error_names_the_argument(backend: Backend, bad: Bad) -> None:
    of_blend = good_call(backend.device, sample=False)
    calls = [(backend.blend_sample, good_call(backend.device))]
    if bad.argument in of_blend:
        calls.append((backend.blend, of_blend))
    value = bad.value(backend.device) if callable(bad.value) else bad.value
    for op, call in calls:
        with pytest.raises(bad.error, match=bad.says) as caught:
            op(**{**call, **bad.also, bad.argument: value})
        assert "must" in str(caught.value) or bad.argument == "colour"


@pytest.mark.parametrize("name", ["seed", "step", "logits", "weights"])
def test_arguments_that_must_be_given(backend: Backend, name: str) -> None:
    call = good_call(backend.device)
    del call[name]
    with pytest.raises(TypeError, match=name):
        backend.blend_sample(**call)


@pytest.mark.parametrize("name", ["cuda", "", 3])
def test_no_such_backend(name: Any) -> None:
    with pytest.raises(ValueError, match=r"backend is .*; it must be None or one of"):
        ops.blend(matrices(1), [1.0], backend=name)
    with pytest.raises(ValueError, match=r"backend is .*; it must be None or one of"):
        ops.blend_sample(matrices(1), [1.0], seed=0, step=0, backend=name)


def test_backend_of_another_device() -> None:
    with pytest.raises(ValueError, match="backend is 'native', which cannot run on meta"):
        ops.blend([meta(1, 4)], [1.0], backend="native")


SUPPORTS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"term": -1}, ValueError),
    ({"term": 0.0}, TypeError),
    ({"top_k": -1}, ValueError),
    ({"top_k": 2.0}, TypeError),
    ({"top_p": -0.1}, ValueError),
    ({"top_p": 1.1}, ValueError),
    ({"top_p": NAN}, ValueError),
    ({"top_p": "0.9"}, TypeError),
    ({"min_p": 1.01}, ValueError),
    ({"min_p": None}, TypeError),
]


@pytest.mark.parametrize(("settings", "error"), SUPPORTS, ids=str)
def test_support(settings: dict[str, Any], error: type[Exception]) -> None:
    name = next(iter(settings))
    with pytest.raises(error, match=rf"Support\.{name} is .*; it must be"):
        Support(**settings)


def test_table_is_whole() -> None:
    """It has at least 60 bad calls, in which every argument of both ops is bad once."""
    assert len(OF_BLEND) + len(OF_SAMPLING) >= 60
    tried = {bad.argument for bad in OF_BLEND + OF_SAMPLING} | {"backend"}
    for op in (ops.blend, ops.blend_sample):
        assert set(op.__kwdefaults__) | {"logits", "weights", "seed", "step"} <= tried
        assert set(op.__code__.co_varnames[: op.__code__.co_argcount]) <= tried
