"""What formulas of the command line mean, and that they can do nothing else."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
from crossfade.blends.blend import Blend, Model, ValueHead
from crossfade.formula import names_in, parse
from crossfade.ops import Support
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make

LMS = {name: make("llama", seed) for seed, name in enumerate(("base", "tuned", "ref"))}


@pytest.mark.parametrize(
    ("formula", "printed"),
    [
        ("base", "base"),
        ("base + 0.8 * (tuned - ref)", "base + 0.8*tuned - 0.8*ref"),
        ("  base+(\n tuned )", "base + tuned"),
        ("-base", "-base"),
        ("2 * -base / 4", "-0.5*base"),
        ("(1 - 0.3) * ref + 0.3 * tuned", "0.7*ref + 0.3*tuned"),
        ("base - base + tuned", "0*base + tuned"),
        ("1e-3*base", "0.001*base"),
        ("1/3*(base+tuned+ref)", "0.333333333333*base + 0.333333333333*tuned + 0.333333333333*ref"),
    ],
)
def test_meaning(formula, printed):
    assert str(parse(formula, **LMS)) == printed


def test_what_names_can_stand_for():
    guide = Model(LMS["tuned"], name="x") - Model(LMS["ref"], name="y")
    blend = parse("b + 2*guide + q", b=LMS["base"], guide=guide, q=ValueHead(LMS["ref"]))
    assert str(blend) == "b + 2*x - 2*y + q"
    assert str(parse("new", new=Model(LMS["base"], name="old"))) == "new"
    assert str(parse("formula", formula=LMS["base"])) == "formula"
    with pytest.raises(TypeError, match="b has a str"):
        parse("b", b="gpt2")


number = st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.12g}"))


number = st.sampled_from([0.0, -0.0, 1.0, -1.0]) | number
TERMS = [Model(lm, name=n) for n, lm in LMS.items()]
VALUE = ValueHead(LMS["ref"], name="q")


def check_reads_back(blend):
    again = parse(str(blend), **LMS, q=VALUE)
    assert again.terms == blend.terms
    assert again.weights == blend.weights
    assert (again.values, again.value_weights) == (blend.values, blend.value_weights)
    assert (again.power, again.support) == (blend.power, blend.support)
    assert str(again) == str(blend)


@st.composite
def sums(draw):
    """Any blend whose weights are numbers. Its first term, and any other, may have weight 0."""
    members = (*draw(st.permutations(TERMS)), *draw(st.permutations([VALUE, *TERMS])))
    eighths = st.integers(-8000, 8000).map(lambda n: n / 8)  # their sums have few digits
    return sum(draw(eighths | st.just(0.0)) * m for m in members)


cuts = st.builds(
    Support,
    term=st.integers(0, 2),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([1.0, 0.9, 0.25]),
    min_p=st.sampled_from([0.0, 0.1]),
)


@given(sums())
def test_what_prints_reads_back(blend):
    check_reads_back(blend)


@given(st.tuples(number, number, number), cuts, number)
def test_a_support_reads_back(weights, support, gain):
    """The term that it is cut from stays in the text though it has weight 0."""
    check_reads_back(Blend(tuple(TERMS), weights, support=support) + gain * VALUE)


@given(
    st.sampled_from([(0.5, 0.25, 0.25), (0, 0.5, 0.5), (1, 0, 0), (0, 0, 1), (0.75, 0, 0.25)]),
    st.sampled_from([1.0, -1.0, 0.5, -2.0, math.inf, -math.inf]),
    st.none() | cuts,
)
def test_a_power_mean_reads_back(weights, r, support):
    check_reads_back(Blend(tuple(TERMS), weights, power=r, support=support) - 2 * VALUE)


def test_a_formula_for_a_power_mean_within_a_support():
    blend = parse("power_mean([base, (tuned)], weights=[1 - 0.25, 1/4], r=-1)", **LMS)
    assert str(blend) == "power_mean([base, tuned], weights=[0.75, 0.25], r=-1)"
    guides = Model(LMS["tuned"], name="x") - Model(LMS["ref"], name="y")
    blend = parse("(base + 2*guides).within(Support(term=2, min_p=0.1))", **LMS, guides=guides)
    assert str(blend) == "(base + 2*x - 2*y).within(Support(term=2, min_p=0.1))"
    blend = parse("base.within(Support()) + 3*q", base=LMS["base"], q=VALUE)
    assert str(blend) == "base.within(Support(term=0)) + 3*q"


def test_unions_and_intersections():
    for text in ("union(base, tuned)", "intersection(base, tuned, ref)"):
        blend = parse(text, **LMS)
        assert str(blend) == text
        check_reads_back(blend)
    blend = parse("power_mean([base, tuned], weights=[0.75, 0.25], r=-inf)", **LMS)
    assert blend.power == -math.inf
    assert str(blend) == "power_mean([base, tuned], weights=[0.75, 0.25], r=-inf)"
    assert str(parse("union(inf, b)", inf=LMS["base"], b=LMS["tuned"])) == "union(inf, b)"


@pytest.mark.parametrize(
    ("formula", "problem", "column"),
    [
        (
            "base + tunde",
            r"'tunde' \(known: base, ref, tuned\); did you mean 'tuned'",
            8,
        ),
        ("base + tuned.weight", "only names, numbers", 8),
        ("base + __import__('os')", "unknown function '__import__'", 8),
        ("union()", r"union\(\) has no terms", 1),
        ("unoin(base)", r"unknown function 'unoin' .*did you mean 'union'", 1),
        ("inf * base", "weight is inf; it must be finite", 7),
        ("base[0]", "only names, numbers", 1),
        ("base ** 2", "only names, numbers", 1),
        ("base @ ref", "only names, numbers", 1),
        ("+base", "only names, numbers", 1),
        ("base * True", "only names, numbers", 8),
        ("base * 2j", "only names, numbers", 8),
        ("base * '2'", "only names, numbers", 8),
        ("base if 1 else ref", "only names, numbers", 1),
        ("(x := base)", "only names, numbers", 2),
        ("lambda: base", "only names, numbers", 1),
        ("base # + ref", "only names, numbers", 6),
        ("base < ref", "only names, numbers", 1),
        ("power_mean(base)", r"missing a required argument: 'weights'; it must be power_mean\(", 1),
        ("power_mean([base], r=1)", "missing a required argument: 'weights'", 1),
        ("power_mean([base], weights=[1], r=1, s=2)", "unexpected keyword argument 's'", 1),
        ("power_mean(base, weights=[1], r=1)", "models is a Model; it must be a list", 1),
        ("power_mean([[base]], weights=[1], r=1)", "only names, numbers", 13),
        (
            "eft(base, tuned, ref, bta=2)",
            r"eft\(.*, ref, beta=1.0\); did you mean 'beta'",
            1,
        ),
        ("base + eff(base, tuned, ref)", "unknown function 'eff' .*; did you mean 'eft'", 8),
        ("ivg(base, tuned, ref, base)", "ivg is a blend and a search; write eft", 1),
        ("gsi(base, tuned, ref)", "gsi is a blend and a search; write sampler, and search by", 1),
        ("cfg(base, 1.5)", "one of them must be given", 1),
        ("cfg(base, 1.5, **base)", "only names, numbers", 1),
        ("cfg(*base)", "only names, numbers", 5),
        ("cfg(base, scale=True)", "only names, numbers", 17),
        ("cfg(base, 'much', negative_prompt='a')", "scale is a str", 1),
        ("args(base, tuned)", "value has a Model", 1),
        ("power_mean([base], weights=[2], r=1)", "weights sum to 2", 1),
        ("power_mean([base], weights=[tuned], r=1)", "weights\\[0\\] is a", 1),
        ("ref + power_mean([base], weights=[1], r=1)", "cannot be added to", 7),
        ("base.within(ref)", "only names, numbers", 1),
        ("base.within(Support(0))", "only names, numbers", 1),
        ("base.within(Support(term=1))", "support.term is 1", 1),
        ("base.within(Support(top_p=2))", "within", 1),
        ("base.within(Support(top_k='2'))", "must be an int", 1),
        ("base.within(Support(top_q=2))", "only names, numbers", 1),
        ("base.within(Support(top_k=1 + 1))", "only names, numbers", 1),
        ("3 .within(Support())", "is no blend", 1),
        ("base.within(Support(top_k=2)).within(Support(top_k=2))", "already", 1),
        ("exec(base)", "unknown function 'exec'", 1),
        ("base.parameters()", "only names, numbers", 1),
        ("base; ref", "", 5),
        ("base = ref", "", None),
        ("2 base", "", None),
        ("base +", "", 7),
        ("(base", "", 1),
        ("", "", 1),
        ("base + 1", "float cannot be added", 8),
        ("base * ref", "weight is a Model", 8),
        ("1 / base", "unsupported operand", 5),
        ("base / 0", "divisor is 0", 8),
        ("base * (1 / 0)", "division by zero", 13),
        ("1e999 * base", "weight is inf", 9),
        ("9" * 400 + " * base", "too large", 1),
        ("base + (-5 - -ref * base)", "weight is a Model", 21),
    ],
)
def test_errors_show_the_place(formula, problem, column):
    with pytest.raises(ValueError, match=rf"^formula: .*{problem}") as error:
        parse(formula, **LMS)
    if column is not None:
        assert f"at column {column}\n" in str(error.value)
        assert str(error.value).endswith("\n  " + " " * (column - 1) + "^")


def test_columns_count_characters():
    """Python's parser counts bytes, which is wrong here for what is not ASCII."""
    with pytest.raises(ValueError, match="at column 9"):
        parse("größe + x", größe=LMS["base"])


def test_names_that_python_reads_in_another_form():
    blend = 2 * Model(LMS["base"], name="ﬁne") + Model(LMS["ref"], name="ª")
    assert (
        parse(str(blend), **dict(zip(blend.names, blend.terms, strict=True))).terms == blend.terms
    )


@pytest.mark.parametrize(
    ("formula", "match"),
    [
        ("1 + 2", "at least one model"),
        ("(" * 1000 + "base" + ")" * 1000, "formula: "),
        ("-" * 4000 + "base", "nested too deeply"),
        ("base + " * 1000 + "base", "at most 4096"),
        ("base\0", "formula: "),
    ],
)
def test_formulas_from_a_hostile_hand(formula, match):
    with pytest.raises(ValueError, match=match):
        parse(formula, **LMS)


def test_formula_is_text():
    with pytest.raises(TypeError, match="formula is a int"):
        parse(3)


@pytest.mark.parametrize(
    ("formula", "printed"),
    [
        ("eft(base, tuned, ref, beta=0.8)", "base + 0.8*tuned - 0.8*ref"),
        ("dera(ref, aligned=tuned, lam=w)", "0.25*ref + 0.75*tuned"),
        ("0.5 * proxy_tuning(base, tuned, ref)", "0.5*base + 0.5*tuned - 0.5*ref"),
        ("mod([base, ref], [w, 1 - w])", "0.75*base + 0.25*ref"),
        (
            "mod([base, ref], [0.5, 0.5], divergence='forward_kl')",
            "power_mean([base, ref], weights=[0.5, 0.5], r=-1)",
        ),
        ("genarm(base, [tuned, ref], [1, 2 * w])", "base + tuned + 1.5*ref"),
        (
            "contrastive(base, ref, alpha=0.2)",
            "(1.5*base - 0.5*ref).within(Support(term=0, min_p=0.2))",
        ),
        ("args(base, q, top_k=5)", "base.within(Support(term=0, top_k=5)) + q"),
        ("cfg(base, 1.5, negative_system='Be rude.')", "1.5*base - 0.5*uncond"),
    ],
)
def test_presets(formula, printed):
    models = LMS | {"q": VALUE}
    assert (
        str(parse(formula, **models, **({"w": 0.75} if "w" in names_in(formula) else {})))
        == printed
    )


def test_a_preset_takes_a_text():
    blend = parse("cfg(base, 1.5, negative_system='Be rude.')", **LMS)
    assert [t.system for t in blend.terms] == [None, "Be rude."]
    blend = parse("cfg(base,\n  1.5, negative_system='a  b #1')", **LMS)
    assert [t.system for t in blend.terms] == [None, "a  b #1"]


def test_a_fader_is_a_number_or_a_number_for_each_request():
    assert str(parse("base + w * (tuned - ref) / (1 + v)", **LMS, w=0.8, v=1)) == (
        "base + 0.4*tuned - 0.4*ref"
    )
    w, v = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 4.0])
    blend = parse("-w * base / v + (1 - w) / v * ref + 3 * tuned", **LMS, w=w, v=v)
    each = [[0, 1, 3], [-0.5, -0.25, 3]]
    torch.testing.assert_close(blend.row_weights(2), torch.tensor(each))


@pytest.mark.parametrize(
    ("faders", "problem"),
    [
        ({}, "unknown name 'w'"),
        ({"w": 0.8, "v": 1.0}, "the fader v is not in 'base \\+ w \\* ref'"),
        ({"w": float("nan")}, "w is nan; it must be finite"),
        ({"w": float("inf")}, "w is inf; it must be finite"),
        ({"w": torch.tensor([1.0, float("nan")])}, "w has a number that is not finite"),
        ({"w": torch.ones(2, 2)}, r"w has shape \[2, 2\]"),
    ],
)
def test_faders_that_are_missing_unknown_or_not_finite(faders, problem):
    with pytest.raises(ValueError, match=problem):
        parse("base + w * ref", **LMS, **faders)


@pytest.mark.parametrize(
    ("formula", "problem"),
    [("base / w", "division by zero"), ("1 / (1e-30 * w) / 1e30 * base", "division by zero")],
)
def test_a_fader_by_which_a_weight_is_not_finite(formula, problem):
    with pytest.raises(ValueError, match=problem):
        parse(formula, **LMS, w=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="not finite"):
        parse("w * 1e30 * base", **LMS, w=torch.tensor([1.0, 1e30]))


def test_a_faders_own_rules():
    with pytest.raises(ValueError, match=r"faders are w \[2\] and v \[3\]"):
        parse("w * base + v * ref", **LMS, w=torch.ones(2), v=torch.ones(3))
    guide = Model(LMS["tuned"], name="w") - Model(LMS["ref"], name="x")
    with pytest.raises(ValueError, match="the fader w has the name of a term of w - x"):
        parse("base + w * guide", base=LMS["base"], guide=guide, w=0.5)
    with pytest.raises(ValueError, match=r"the fader wide is not in .*; did you mean 'width'"):
        parse("width * base", **LMS, width=1.0, wide=1.0)
    with pytest.raises(TypeError, match="w is a bool"):
        parse("w * base", **LMS, w=True)


def test_a_product_without_its_sign() -> None:
    with pytest.raises(ValueError, match=r"a product has a \*, as in 0.5 \* \(a - b\), which is"):
        parse("a + 0.5(a - b)", a=Model(make(seed=0)), b=Model(make(seed=1)))


def test_formulas_read_by_several_threads() -> None:
    """One thread reads a formula in the middle of another's: Python's parser does not stand it."""
    text = " + ".join(["a * (b - c)"] * 20)
    found: list[set[str]] = []
    threads: list[threading.Thread] = []

    def beside(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and len(threads) < 5:
            threads.append(threading.Thread(target=lambda: found.append(names_in(text))))
            threads[-1].start()
            threads[-1].join(0.1)

    before = gc.get_threshold()
    gc.set_threshold(20)  # A collection, and with it another thread, comes while a tree is made.
    gc.callbacks.append(beside)
    try:
        found.append(names_in(text))
    finally:
        gc.callbacks.remove(beside)
        gc.set_threshold(*before)
    for thread in threads:
        thread.join()
    assert found == [{"a", "b", "c"}] * (1 + len(threads))
    assert threads
