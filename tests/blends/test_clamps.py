"""Clamps, and unions and intersections among other terms: what they are, print and save."""

from __future__ import annotations

import json
import math

import pytest
import torch
from crossfade.blends.blend import Blend
from crossfade.blends.parts import Part
from crossfade.blends.power_mean import intersection, power_mean, union
from crossfade.formula import parse
from crossfade.ops import Support
from small_terms import LMS, A, B, C, Q, weights

MODELS = {"a": LMS[0], "b": LMS[1], "c": LMS[2], "q": Q}
BOTH = torch.tensor([0.5, 1.0])


def part_of(blend):
    (part,) = blend.parts
    return dict(zip(part.terms, part.weights, strict=True)), part.power, part.min, part.max


def test_a_clamp():
    blend = A + (0.8 * (B - C)).clamp(min=-2, max=1)
    assert weights(blend) == {"a": 1, "b": 0, "c": 0}
    assert part_of(blend) == ({B: 0.8, C: -0.8}, 0.0, -2.0, 1.0)
    assert part_of((B - A).clamp(0)) == ({B: 1, A: -1}, 0.0, 0.0, math.inf)
    assert part_of(B.clamp(max=torch.tensor(-1.0))) == ({B: 1}, 0.0, -math.inf, -1.0)


def test_a_scaled_clamp_has_scaled_bounds():
    """Another sign makes the least the most."""
    assert part_of(A - (2 * B).clamp(-1, 3) / 2) == ({B: -1}, 0.0, -1.5, 0.5)
    assert part_of(-B.clamp(min=-1)) == ({B: -1}, 0.0, -math.inf, 1.0)
    assert (A + 0 * B.clamp(min=-1)).parts == ()
    assert weights(A + 0 * B.clamp(min=-1)) == {"a": 1}
    with pytest.raises(ValueError, match=r"one min and one max .*\(w \* \(a - b\)\)\.clamp"):
        BOTH * B.clamp(min=-1)


def test_unions_among_terms():
    blend = A - 0.95 * union(A, B)
    assert weights(blend) == {"a": 1, "b": 0}
    assert part_of(blend) == ({A: -0.475, B: -0.475}, math.inf, -math.inf, math.inf)
    assert part_of(2 * intersection(A, B)) == ({A: 1, B: 1}, -math.inf, -math.inf, math.inf)
    assert part_of(union(A, B).clamp(min=-5)) == ({A: 0.5, B: 0.5}, math.inf, -5.0, math.inf)
    assert len((union(A, B) + intersection(A, C)).parts) == 2
    rows = (A + BOTH * union(A, B)).row_part_weights(2)
    assert rows.tolist() == [[[0.25, 0.25]], [[0.5, 0.5]]]
    with pytest.raises(ValueError, match=r"the weight of b is a tensor \[2\]; it must be \[3\]"):
        (A + (BOTH * B).clamp(min=-1)).row_part_weights(3)


def test_values_alone_leave_a_union_what_it_is():
    assert (union(A, B) + 2 * Q).power == math.inf


def test_terms_that_are_added_come_before_those_of_parts():
    blend = 2 * union(A, B) + C
    assert blend.terms == (A, C, B)
    assert blend.within(Support(term=2, top_k=3)).support == Support(term=2, top_k=3)


FORMULAS = [
    "a + (0.8*b - 0.8*c).clamp(min=-2, max=1)",
    "a - 0.95*union(a, b)",
    "0*a + c + 2*union(a, b)",
    "2*union(a, b)",
    "union(a, b).clamp(min=-5)",
    "a + (-2*intersection(a, b, c)).clamp(max=9)",
    "a + (b - a).clamp(min=0) + (c - a).clamp(min=-1, max=1) - 2*q",
    "(a + (b - c).clamp(min=-1)).within(Support(term=2, top_k=3)) + 1.5*q",
    "0*a + (b - c).clamp(max=0)",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_and_files(text):
    """What prints reads back, from text and from plain data."""
    blend = parse(text, **MODELS)
    assert str(blend) == text
    saved = json.loads(json.dumps(blend.to_dict(), allow_nan=False))
    models = {name: MODELS[name] for name in (*blend.names, *blend.value_names)}
    for again in (parse(str(blend), **MODELS), Blend.from_dict(saved, **models)):
        assert (again.terms, again.weights) == (blend.terms, blend.weights)
        assert list(map(part_of, [again])) == [part_of(blend)] if len(blend.parts) == 1 else True
        assert again.row_part_weights(1) == blend.row_part_weights(1)
        assert again.support == blend.support
        assert str(again) == text


def test_weights_of_requests_are_saved():
    blend = A + (BOTH * B - A).clamp(min=-1)
    saved = json.loads(json.dumps(blend.to_dict(), allow_nan=False))
    assert saved["parts"][0]["weights"] == {"b": [0.5, 1.0], "a": -1.0}
    loaded = Blend.from_dict(saved, a=A, b=B)
    assert torch.equal(loaded.row_part_weights(2), blend.row_part_weights(2))


def test_older_files_have_no_parts():
    assert "parts" not in (A + B).to_dict()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: A.clamp(), ValueError, "min and max are None; one of them must be given"),
        (lambda: A.clamp(min=math.nan), ValueError, "min is nan; it must be finite"),
        (lambda: A.clamp(max=-math.inf), ValueError, "max is -inf; it must be finite"),
        (lambda: A.clamp(min="1"), TypeError, "min is '1'; it must be a number"),
        (lambda: A.clamp(max=BOTH), TypeError, "max is tensor.*; it must be a number"),
        (lambda: A.clamp(2, 1), ValueError, "min is 2; it must be at most max, which is 1"),
        (lambda: A.clamp(low=1), TypeError, "clamp got an unknown argument 'low'"),
        (lambda: (A + Q).clamp(0), ValueError, "cannot be clamped: it is a sum with values"),
        (lambda: Q.clamp(0), ValueError, "q cannot be clamped: it is a sum with values"),
        (lambda: (A + B.clamp(0)).clamp(1), ValueError, "cannot be clamped: .*beside it"),
        (lambda: A.clamp(0).clamp(1), ValueError, "cannot be clamped: it is a sum with a clamp"),
        (
            lambda: power_mean([A, B], [0.5, 0.5], r=1).clamp(0),
            ValueError,
            "cannot be clamped: it is a power mean with r = 1",
        ),
        (
            lambda: A.within(Support(top_k=2)).clamp(0),
            ValueError,
            "cannot be clamped: it is a blend within a support",
        ),
        (
            lambda: power_mean([A, B], [0.5, 0.5], r=1) + union(A, B),
            ValueError,
            r"log-probs of union\(a, b\) cannot be added to a power mean with r = 1",
        ),
        (lambda: Blend((A,), (1,), parts=(B,)), TypeError, "parts have a Model; they must be of"),
        (lambda: Part((A,), (1,), 1.0), ValueError, "power is 1.0; of a part it must be 0, inf"),
        (
            lambda: Blend((A,), (1,), power=1, parts=(Part((B,), (1,)),)),
            ValueError,
            "power is 1; it must be 0, as the blend has parts",
        ),
        (lambda: sum([B.clamp(0)] * 9), ValueError, "parts are 9; they must be at most 8"),
    ],
)
def test_what_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parts": {}}, r"d\['parts'\] is {}; it must be what .*, a list"),
        ({"parts": [{}]}, r"d\['parts'\]\[0\] has no 'max'"),
        ({"weights": {}}, r"d\['parts'\]\[0\]\['weights'\] is {}; it must be what"),
        ({"weights": {"z": 1.0}}, r"\['weights'\] has 'z'; its terms are \['a', 'b'\]"),
        ({"weights": {"a": math.nan}}, r"\['weights'\]\['a'\] is nan"),
        ({"power": "Infinity"}, r"\['power'\] is 'Infinity'; it must be a number"),
        ({"power": 1.0}, r"d\['parts'\]\[0\]: power is 1.0; of a part it must be 0, inf or -inf"),
        ({"min": "2"}, r"\['min'\] is '2'; it must be a number"),
        ({"min": 2.0}, r"d\['parts'\]\[0\]: min is 2; it must be at most max, which is 1"),
    ],
)
def test_bad_files(change, says):
    saved = (A + (B - A).clamp(-1, 1)).to_dict()
    if "parts" in change:
        saved |= change
    else:
        saved["parts"][0] |= change
    with pytest.raises(ValueError, match=says):
        Blend.from_dict(saved, a=A, b=B)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a + (b - a).clamp()", "min and max are None"),
        ("a + (b - a).clamp(low=1)", "unknown argument 'low'"),
        ("a + (b - a).clamp(min=a)", "min is .*; it must be a number"),
        ("a + 2 .clamp(1)", "2.0 is no blend; only a blend can be clamped"),
        ("a + b.clam(1)", "only names, numbers"),
    ],
)
def test_bad_formulas(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text, **MODELS)
