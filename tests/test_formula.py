"""Formulas from the command line: what they mean, and that they can do nothing else."""

from __future__ import annotations

import pytest
from crossfade.blend import Model, ValueHead
from crossfade.formula import parse
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)
LMS = dict(zip(("base", "tuned", "ref"), (LlamaForCausalLM(CONFIG) for _ in range(3)), strict=True))


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


@given(st.tuples(number, number, number))
def test_what_prints_reads_back(weights):
    blend = sum(w * Model(lm, name=n) for w, (n, lm) in zip(weights, LMS.items(), strict=True))
    again = parse(str(blend), **LMS)
    assert again.terms == blend.terms
    assert again.weights == blend.weights
    assert str(again) == str(blend)


@pytest.mark.parametrize(
    ("formula", "problem", "column"),
    [
        ("base + tunde", r"unknown name 'tunde' \(known: base, ref, tuned\)", 8),
        ("base + tuned.weight", "only names, numbers", 8),
        ("base + __import__('os')", "only names, numbers", 8),
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
    """Python's parser counts bytes."""
    with pytest.raises(ValueError, match="at column 9"):
        parse("größe + x", größe=LMS["base"])


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
