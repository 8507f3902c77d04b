"""A vocabulary in shards: the tokens and log-probs are those of whole rows, whatever the shards."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import INF, NAN, Backend, Problem, lay_out, mean_weights, normal, problem
from crossfade import ops
from crossfade.ops import BlendSample, Part, Support, thresholds
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

IDS = {"seed": 2**63 + 5, "stream": 7, "step": 3}


def in_parts(
    p: Problem, cuts: list[int], backend: str | None = None, **options: Any
) -> list[ops.Partial]:
    """The rows of a problem in shards that begin at 0 and at each of the cuts."""
    bounds = [0, *cuts, p.vocab]
    given = {k: v for k, v in p.options.items() if k not in ("mask", "vocab_size")}
    mask = p.options.get("mask")
    return [
        ops.blend_sample(
            [z[:, a:b] for z in p.logits],
            p.weights,
            [q[:, a:b] for q in p.values],
            p.value_weights,
            mask=None if mask is None else mask[..., a:b],
            first_token=a,
            return_partial=True,
            backend=backend,
            **given,
            **{**IDS, **options},
        )
        for a, b in pairwise(bounds)
    ]


def whole(p: Problem, backend: str | None = None, **options: Any) -> BlendSample:
    return ops.blend_sample(*p.args, **p.options, backend=backend, **{**IDS, **options})


def assert_same(got: BlendSample, want: BlendSample, atol: float = 1e-5) -> None:
    assert got.tokens.tolist() == want.tokens.tolist()
    close = {"atol": atol, "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(got.logprobs, want.logprobs, **close)
    torch.testing.assert_close(got.sampled_logprobs, want.sampled_logprobs, **close)
    if want.term_logprobs is None:
        assert got.term_logprobs is None
    else:
        torch.testing.assert_close(got.term_logprobs, want.term_logprobs, **close)


def skip_most(backend: Backend, cut: dict[str, Any]) -> None:
    """A truncation takes of a backend its scores and its draws, whatever it is."""
    if backend.interpreted and cut not in ({}, {"do_sample": False}, {"top_k": 9}):
        pytest.skip("other backends show it, and the interpreter takes long")


CUTS: dict[str, list[int]] = {
    "one": [],
    "at a group": [256],
    "amid a group": [300],
    "amid a counter's words": [333, 501],
    "several in a group": [257, 270, 300],
    "uneven": [1, 700],
}
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"do_sample": False},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 9},
    "top_k of nearly all": {"top_k": 690},
    "top_p": {"top_p": 0.8, "temperature": 1.4},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
}


@pytest.mark.parametrize("cut", TRUNCATIONS.values(), ids=TRUNCATIONS)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_tokens_are_those_of_whole_rows(
    backend: Backend, cuts: list[int], cut: dict[str, Any]
) -> None:
    skip_most(backend, cut if cuts == [333, 501] else {"cuts": cuts})
    p = problem(backend, rows=2 if backend.interpreted else 4, vocab=701, values=1)
    got = ops.merge(in_parts(p, cuts, backend.name, **cut))
    assert_same(got, whole(p, backend.name, **cut))


@st.composite
def draws(draw: Any) -> tuple[Problem, list[int], dict[str, Any]]:
    """A problem, cuts of its vocabulary, and settings a row."""
    rows, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 255, 256, 257, 600, 2100]))
    terms, seed = draw(st.integers(1, 3)), draw(st.integers(0, 10**6))
    power = draw(st.sampled_from([0.0, 0.0, 0.0, 1.0, -0.5]))
    scale = draw(st.sampled_from([0.1, 2.0, 9.0]))
    each = [normal(rows, vocab, seed + k, scale=scale) for k in range(terms)]
    options: dict[str, Any] = {"power": power}
    if draw(st.booleans()):
        options["mask"] = normal(rows, vocab, seed + 50) > -2.0
        options["mask"][:, seed % vocab] = True
    if draw(st.integers(0, 3)) == 0:
        cut = {"top_k": draw(st.sampled_from([0, 30])), "top_p": draw(st.sampled_from([1.0, 0.7]))}
        options["support"] = Support(0, **cut, min_p=draw(st.sampled_from([0.0, 0.01])))
        options.pop("mask", None)  # they might leave nothing
    weights = mean_weights(rows, terms, seed) if power else normal(rows, terms, seed, scale=1.0)

    def each_row(*choices: float) -> Tensor:
        return torch.tensor([draw(st.sampled_from(choices)) for _ in range(rows)])

    settings: dict[str, Any] = {}
    if draw(st.booleans()):
        settings["temperature"] = each_row(0.0, 0.3, 1.0, 2.0)
    if draw(st.booleans()):
        settings["top_k"] = each_row(0, 1, 7, 300, 1500)
    if draw(st.booleans()):
        settings["top_p"] = each_row(0.0, 0.5, 0.95, 0.9999, 1.0)
    if draw(st.booleans()):
        settings["min_p"] = each_row(0.0, 0.02, 1.0)
    settings["return_term_logprobs"] = draw(st.booleans())
    settings |= {"seed": seed, "stream": torch.arange(rows), "step": draw(st.integers(0, 99))}
    cuts = draw(st.lists(st.integers(1, vocab - 1), max_size=3, unique=True)) if vocab > 1 else []
    return Problem(each, weights, options=options), sorted(cuts), settings


@examples(max_examples=120, deadline=None)
@given(draws())
def test_every_draw_is_that_of_whole_rows(case: tuple[Problem, list[int], dict[str, Any]]) -> None:
    p, cuts, settings = case
    assert_same(ops.merge(in_parts(p, cuts, **settings)), whole(p, **settings), atol=2e-5)


@pytest.mark.sweep
@examples(max_examples=4000, deadline=None)
@given(draws())
def test_many_draws_are_those_of_whole_rows(
    case: tuple[Problem, list[int], dict[str, Any]],
) -> None:
    p, cuts, settings = case
    assert_same(ops.merge(in_parts(p, cuts, **settings)), whole(p, **settings), atol=2e-5)


def test_parts_of_a_blend_with_unions_and_clamps(backend: Backend) -> None:
    """A part takes the normalisers of whole rows."""
    parts = [Part([0.5, -0.5, 0.0], min=-1.0, max=1.0), Part([0.0, 0.4, 0.4], power=INF)]
    p = problem(backend, rows=2, vocab=520, parts=parts)
    for cut in ({}, {"top_p": 0.9})[: 1 if backend.interpreted else 2]:
        assert_same(
            ops.merge(in_parts(p, [300], backend.name, **cut)), whole(p, backend.name, **cut)
        )


def test_dtypes_and_layouts(backend: Backend) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        p = problem(backend, rows=2, vocab=520, dtype=dtype, layout="padded")
        got = ops.merge(in_parts(p, [300], backend.name, top_k=20))
        assert_same(got, whole(p, backend.name, top_k=20))


# ---- Ties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[256], [5], [300, 400]])
@pytest.mark.parametrize("cut", [{}, {"do_sample": False}, {"top_k": 3}, {"top_p": 0.5}])
def test_ties_across_shards(cuts: list[int], cut: dict[str, Any]) -> None:
    """Every tie with a threshold stays; the lowest of the best tokens is the greedy one."""
    z = normal(6, 600, 1, scale=1.0).round()
    p = Problem([z], [1.0])
    assert_same(ops.merge(in_parts(p, cuts, **cut)), whole(p, **cut))


@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.7}])
def test_flat_rows(cut: dict[str, Any]) -> None:
    """All tokens tie, those beyond the candidates that parts send too."""
    p = Problem([torch.zeros(3, 3000)], [1.0])
    streams = {"stream": torch.arange(3)}
    assert_same(ops.merge(in_parts(p, [900], **cut, **streams)), whole(p, **cut, **streams))


def test_no_tie_is_lost_at_the_floor_of_a_part() -> None:
    """A part has more tokens at the threshold than it sends: they count for what top-p keeps."""
    z = torch.full((1, 1000), -1.0)
    z[0, 990:] = 2.0
    p = Problem([z], [1.0])
    for seed in range(40):
        cut = {"top_k": 15, "top_p": 0.9, "seed": seed}
        assert_same(ops.merge(in_parts(p, [500, 995], **cut)), whole(p, **cut))


# ---- Thresholds beyond the candidates ------------------------------------------------------------


def test_a_nucleus_of_many_tokens() -> None:
    p = Problem([normal(3, 9000, 3, scale=0.2)], [1.0])
    for top_p in (0.5, 0.9, 0.999):
        for stream in range(5):
            cut = {"top_p": top_p, "stream": stream}
            assert_same(ops.merge(in_parts(p, [4000, 4700], **cut)), whole(p, **cut))


def test_ranks_beyond_what_is_sent() -> None:
    p = Problem([normal(3, 9000, 4, scale=0.2)], [1.0])
    for top_k in (1025, 5000, 2**62):
        for top_p in (1.0, 0.6):
            cut = {"top_p": top_p, "top_k": top_k}
            assert_same(ops.merge(in_parts(p, [4000, 4700], **cut)), whole(p, **cut))


@pytest.mark.parametrize("cut", [{"top_k": 900}, {"top_p": 0.9}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [1e-44, 1e-38, 1e-20, 1e20])
def test_temperatures_that_float32_hardly_has(temperature: float, cut: dict[str, Any]) -> None:
    """A score that is divided by one may be infinite; what it is below the best one is not."""
    z = 5 * normal(3, 900, 3, scale=1.0) - 60
    z[:, [7, 300]] = -3.0
    p = Problem([z], [1.0])
    cut = {**cut, "temperature": temperature, "stream": torch.arange(3)}
    assert_same(ops.merge(in_parts(p, [256, 420], **cut)), whole(p, **cut))


@pytest.mark.parametrize("cut", [{"top_k": 900}, {"top_p": 0.9}, {"min_p": 0.5}], ids=str)
def test_large_scores_are_not_rounded(cut: dict[str, Any]) -> None:
    """A log-prob is the small difference of two numbers that float32 would round."""
    p = Problem([normal(9, 900, 3, scale=1.0) + 900.0], [1.0])
    cut = {**cut, "stream": torch.arange(9)}
    assert_same(ops.merge(in_parts(p, [256, 420], **cut)), whole(p, **cut))


def test_keys_of_floats_sort_as_they_do() -> None:
    x = torch.tensor([-INF, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 2.5, 3e38])
    keys = thresholds._key(x)
    assert keys[4] == keys[5]
    assert (keys[[0, 1, 2, 3, 5, 6, 7]] < keys[[1, 2, 3, 5, 6, 7, 8]]).all()
    assert torch.equal(thresholds._of_key(keys).float(), x.where(x != 0, 0.0))


# ---- Bad rows, and parts without tokens ----------------------------------------------------------


@pytest.mark.parametrize("cut", [{}, {"top_k": 9}, {"top_p": 0.8}, {"do_sample": False}])
@pytest.mark.parametrize("odd", [NAN, INF])
def test_a_row_that_is_bad_in_one_part(backend: Backend, odd: float, cut: dict[str, Any]) -> None:
    skip_most(backend, cut)
    p = problem(backend, rows=3, vocab=520)
    p.logits[0][1, 400] = odd
    got = ops.merge(in_parts(p, [256], backend.name, **cut))
    assert got.tokens[1] == -1
    assert got.logprobs[1].isnan()
    assert got.sampled_logprobs[1].isnan()
    assert_same(got, whole(p, backend.name, **cut))


def test_a_bad_setting() -> None:
    p = Problem([normal(3, 600, 1)], [1.0])
    for cut in ({"top_p": [0.5, 1.5, 0.5]}, {"temperature": [1.0, NAN, 1.0]}):
        settings = {k: torch.tensor(v) for k, v in cut.items()}
        assert_same(ops.merge(in_parts(p, [256], **settings)), whole(p, **settings))


@pytest.mark.parametrize("cut", [{}, {"top_k": 9}, {"top_p": 0.8}, {"do_sample": False}])
def test_a_part_whose_tokens_are_all_masked(backend: Backend, cut: dict[str, Any]) -> None:
    """It is where a padded head's last columns are; the row is bad if all parts are so."""
    skip_most(backend, cut)
    mask = torch.ones(3, 520, dtype=torch.bool)
    mask[0, 256:] = mask[1, :256] = mask[2] = False
    p = problem(backend, rows=3, vocab=520, mask=mask.to(backend.device))
    got = ops.merge(in_parts(p, [256], backend.name, **cut))
    assert got.tokens[2] == -1
    assert_same(got, whole(p, backend.name, **cut))


def test_padding_of_the_last_shard() -> None:
    """A head of 512 columns for 500 tokens, in two shards."""
    z = lay_out(normal(2, 500, 1), "padded", extra=12)
    first = ops.blend_sample([z[:, :256]], [1.0], return_partial=True, **IDS)
    second = ops.blend_sample(
        [z[:, 256:]], [1.0], vocab_size=244, first_token=256, return_partial=True, **IDS
    )
    want = ops.blend_sample([z], [1.0], vocab_size=500, **IDS)
    assert_same(ops.merge([first, second]), want)


def test_no_rows() -> None:
    p = Problem([torch.empty(0, 600)], [1.0])
    for cut in ({}, {"top_p": 0.5}):
        assert ops.merge(in_parts(p, [256], **cut)).tokens.shape == (0,)


# ---- What goes between the parts -----------------------------------------------------------------


def gathering(parts: list[ops.Partial], sizes: list[int]) -> Callable[[Tensor], Tensor]:
    """A `reduce` that writes down how many numbers a part gives."""

    def reduce(own: Tensor) -> Tensor:
        assert own.dtype == torch.float64
        sizes.append(own[0].numel())
        return own

    return reduce


@pytest.mark.parametrize(
    ("cut", "rounds"),
    [
        ({}, [24]),
        ({"top_k": 40}, [44, 24]),
        ({"top_p": 0.9}, [260, 24]),
        ({"min_p": 0.1}, [5, 24]),
        ({"return_term_logprobs": True}, [2, 24, 2]),
        ({"top_p": 0.9999, "temperature": 9.0}, [260, 1, 2048, 2048, 2048, 24]),
        ({"top_k": 5000}, [1028, 2048, 2048, 2048, 24]),
    ],
)
def test_what_is_exchanged_does_not_grow_with_the_vocabulary(
    cut: dict[str, Any], rounds: list[int]
) -> None:
    for vocab in (2000, 50000):
        p = Problem([normal(1, vocab, k, scale=9.0) for k in range(2)], [1.0, 0.5])
        sizes: list[int] = []
        parts = in_parts(p, [900], **cut)
        ops.merge(parts, gathering(parts, sizes))
        assert sizes == rounds


# ---- Mistakes ------------------------------------------------------------------------------------


def test_mistakes() -> None:
    p = Problem([normal(2, 600, 1)], [1.0])
    a, b, c = in_parts(p, [256, 300])
    other = in_parts(Problem([normal(3, 600, 1)], [1.0]), [256])[1]
    for parts, error, words in [
        ([], ValueError, "parts is empty"),
        (a, TypeError, "parts is a Partial; it must be a list"),
        ([whole(p)], TypeError, r"parts\[0\] is a BlendSample; it must be what blend_sample gives"),
        ([a, c], ValueError, r"parts\[1\] begins at token 300; it must begin at 256"),
        ([a, other], ValueError, r"parts\[1\] has 3 rows of 1 terms; it must have 2 rows of 1"),
    ]:
        with pytest.raises(error, match=words):
            ops.merge(parts)
    with pytest.raises(TypeError, match="reduce is a int; it must be a function"):
        ops.merge([a, b, c], reduce=3)
    with pytest.raises(ValueError, match=r"parts\[0\] begins at token 256; it must begin at 0"):
        ops.merge([b, c])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, r"seed 1; it must have 9223372036854775813, as parts\[0\]"),
        ({"temperature": 0.5}, "temperature 0.5; it must have 1.0"),
        ({"top_k": torch.tensor([3, 4])}, r"top_k \[2\] \(a tensor\); it must have 0"),
        ({"do_sample": False}, "do_sample False; it must have True"),
        ({"return_term_logprobs": True}, "return_term_logprobs True; it must have False"),
        ({"support": Support(top_k=3)}, r"support Support\(.*; it must have None"),
    ],
    ids=str,
)
def test_parts_with_other_settings(options: dict[str, Any], words: str) -> None:
    p = Problem([normal(2, 600, 1)], [1.0])
    first, _ = in_parts(p, [256])
    _, other = in_parts(p, [256], **options)
    with pytest.raises(ValueError, match=rf"parts\[1\] has {words}"):
        ops.merge([first, other])


def test_parts_of_other_blends() -> None:
    z = normal(2, 600, 1)
    first, _ = in_parts(Problem([z], [1.0]), [256])
    for other, words in (
        (Problem([z], [2.0]), r"weights \(2.0,\); it must have \(1.0,\)"),
        (Problem([z], [1.0], [z], [1.0]), "values 1; it must have 0"),
        (Problem([z], [1.0], options={"power": 1.0}), "power 1.0; it must have 0.0"),
        (Problem([z], [1.0], options={"parts": [Part([1.0])]}), r"parts \(.*; it must have \(\)"),
    ):
        with pytest.raises(ValueError, match=rf"parts\[1\] has {words}"):
            ops.merge([first, in_parts(other, [256])[1]])


def test_mistakes_of_reduce() -> None:
    parts = in_parts(Problem([normal(2, 600, 1)], [1.0]), [256])
    for reduce, error, words in [
        (lambda x: None, TypeError, "reduce gave NoneType; it must give a float64 tensor"),
        (lambda x: x.float(), TypeError, "reduce gave torch.float32; it must give a float64"),
        (lambda x: x[:1], ValueError, r"it must give \[N, 2, 3, 8\], of all N parts"),
        (lambda x: x.sum(0), ValueError, r"reduce gave a tensor \[2, 3, 8\] of \[2, 2, 3, 8\]"),
    ]:
        with pytest.raises(error, match=words):
            ops.merge(parts, reduce)


def test_mistakes_of_parts() -> None:
    z = normal(2, 600, 1)
    with pytest.raises(ValueError, match="first_token is 256 and return_partial is False"):
        ops.blend_sample([z], [1.0], first_token=256, **IDS)
    with pytest.raises(ValueError, match=r"first_token is -1; it must be within \[0, "):
        ops.blend_sample([z], [1.0], first_token=-1, return_partial=True, **IDS)
    with pytest.raises(TypeError, match=r"first_token is 0.0; it must be an int"):
        ops.blend_sample([z], [1.0], first_token=0.0, return_partial=True, **IDS)
    with pytest.raises(ValueError, match=r"first_token is 2147483647; it must be within \[0, "):
        ops.blend_sample([z], [1.0], first_token=2**31 - 1, return_partial=True, **IDS)
    with pytest.raises(TypeError, match="return_partial is 1; it must be True or False"):
        ops.blend_sample([z], [1.0], return_partial=1, **IDS)
    with pytest.raises(NotImplementedError, match="return_pushes is True and return_partial"):
        ops.blend_sample([z], [1.0], return_pushes=True, return_partial=True, **IDS)
    part = Part(torch.ones(1, requires_grad=True))
    for inputs in ({"logits": [z], "parts": [part]}, {"logits": [z.clone().requires_grad_()]}):
        with pytest.raises(NotImplementedError, match="an input wants a gradient"):
            ops.blend_sample(**inputs, weights=[1.0], return_partial=True, **IDS)
