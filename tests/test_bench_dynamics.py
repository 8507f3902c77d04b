"""The reproduction of learning dynamics: its data, its stages, its figures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")  # TRL needs Python 3.11
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench" / "reproduce"))

import behaviours
import dynamics as run
import dynamics_figures as figures
import dynamics_picture as picture
import stages
import tiny_models as tiny
from reports import dynamics as report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# TRL 1.16 and PEFT use names that Transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`[a-z_.]*gradient_checkpointing:FutureWarning")


def test_behaviours_are_balanced_and_nothing_held_out_is_trained_on() -> None:
    assert len(behaviours.BEHAVIOURS) == 10
    for name in behaviours.BEHAVIOURS:
        said = list(behaviours.statements(name))
        assert len({text for text, *_ in said}) == len(said) >= 200
        for held_out in (False, True):
            labels = [label for _, label, held in said if held == held_out]
            assert sum(labels) * 2 == len(labels) >= 24
        for trained, held in behaviours.split(name):
            assert not set(trained) & set(held)
            texts = [text.lower() for text, _, held_out in said if not held_out]
            assert not any(filler in text for filler in held for text in texts)


def test_scrambled_answers_have_the_words_of_statements_that_do_not_fit() -> None:
    rows = behaviours.answers(seed=0)
    said = [row for name in behaviours.BEHAVIOURS for row in behaviours.statements(name)]
    fits = {text for text, label, _ in said if label}
    words = {tuple(sorted(text.split())) for text, label, _ in said if not label}
    trained = [row for row in rows if not row["held_out"]]
    assert len(trained) == 320
    assert all(tuple(sorted(row["unlikely"].split())) in words for row in trained)
    assert all(row["chosen"] in fits for row in trained)
    assert rows == behaviours.answers(seed=0) != behaviours.answers(seed=1)


def test_the_head_moves_as_the_theorem_says_at_a_small_rate() -> None:
    """And as autograd moves it at a large one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    label = torch.tensor([1.0, -1.0]).repeat(12).double()
    beta = 0.3
    change, _ = figures.trained_head(x, label, x, beta, 1e-6, 8)
    apart = float((x[label > 0].mean(0) - x[label < 0].mean(0)).norm())
    assert change == pytest.approx(3 * 1e-6 * math.sqrt(2) / 4 * beta * apart, rel=1e-5)

    head = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    begun = head.detach().clone()
    for own, sign in zip(x.split(8), label.split(8), strict=True):
        logp = (own @ head.T).log_softmax(-1)[:, :2] - (own @ begun.T).log_softmax(-1)[:, :2]
        loss = -(beta * sign * (logp[:, 0] - logp[:, 1])).sigmoid().log().mean()
        (slope,) = torch.autograd.grad(loss, head)
        head = (head - 5.0 * slope).detach().requires_grad_()
    change, growth = figures.trained_head(x, label, x, beta, 5.0, 8)
    moved = (head - begun).detach()
    assert change == pytest.approx(float(moved.norm()), rel=1e-9)
    torch.testing.assert_close(growth, x @ (moved[0] - moved[1]))


def a_history(falls: dict[str, float]) -> figures.History:
    """Losses that fall to so much below log 2 at once, and stay."""
    own = {name: {"loss": math.log(2)} for name in falls}
    later = {name: {"loss": math.log(2) - x} for name, x in falls.items()}
    return [{"step": step, "behaviours": later if step else own} for step in (0, 1, 11)]


def test_orders_are_compared() -> None:
    rng = np.random.default_rng(1)
    x = np.arange(8.0)
    found = figures.correlation(x, [x + rng.normal(size=8) * 0.3 for _ in range(3)])
    low, high = found["interval"]
    assert low <= found["value"] <= high
    assert found["value"] > 0.8 > -0.8 > figures.correlation(x, [-x])["value"]

    names = ["a", "b", "c"]
    matrix = [[0.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, -1.0, 0.0]]
    told = {"names": names, "priorities": matrix}
    ordered = [a_history({"a": 0.3, "b": 0.2, "c": 0.1}) for _ in range(2)]
    assert figures.pairs(told, ordered)["agree"] == 1.0
    swapped = [a_history({"a": 0.2, "b": 0.3, "c": 0.1})]
    assert figures.pairs(told, swapped)["agree"] == pytest.approx(2 / 3)
    assert figures.fell(ordered[0], "a") == pytest.approx(0.3 * (0.5 + 10) / 11)
    assert figures.first_fall(ordered[0], "a") == pytest.approx(0.3)


def test_data_that_is_evened_out_has_less_spread() -> None:
    told = {"names": ["a", "b"]}
    plain = [a_history({"a": 0.3 + 0.01 * i, "b": 0.1}) for i in range(3)]
    even = [a_history({"a": 0.21 + 0.01 * i, "b": 0.2}) for i in range(3)]
    found = figures.evenness(told, plain, even)
    assert found["spread"]["gap"] < 0
    assert found["spread"]["resolved"]
    assert not figures.evenness(told, plain, plain)["spread"]["resolved"]
    assert figures.paired([0.1, -0.1, 0.2, -0.2])["resolved"] is False
    low, high = figures.paired([1.0, 2.0, 3.0])["interval"]
    assert (low + high) / 2 == 2.0
    assert high - low == pytest.approx(2 * 4.3027 / math.sqrt(3), rel=1e-4)


def a_tokenizer() -> PreTrainedTokenizerFast:
    """Its words are those of all statements, with the space before them, as GPT-2's are."""
    texts = [row["text"] for held_out in (False, True) for row in behaviours.rows(held_out)]
    texts += [f"{run.ASKED} {row['unlikely']}" for row in behaviours.answers(0)]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = ["<pad>", "<eos>", "<unk>", "ĠYes", "ĠNo", *sorted(words)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def test_a_run_of_a_tiny_model_is_reported(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """All stages; those that are there are skipped, and tables and the picture can be made."""
    tokenizer = a_tokenizer()
    monkeypatch.setitem(tiny.SIZES, "vocab_size", len(tokenizer))
    monkeypatch.setattr(stages, "base", lambda dtype: (tiny.make().eval(), tokenizer))
    for name, few in (("rows", 11), ("answers", 7)):
        every = getattr(behaviours, name)
        monkeypatch.setattr(
            behaviours,
            name,
            lambda *args, every=every, few=few, **more: every(*args, **more)[::few],
        )
    for name, x in {
        "SEEDS": (0, 1),
        **{"FLIP_SEEDS": (0,), "SQUEEZE_SEEDS": (0,)},
        **{"STEPS": 2, "EVERY": 1, "BATCH": 4, "LONGEST": 4},
        **{"FLIP_STEPS": 2, "FLIP_EVERY": 1},
        **{"SQUEEZE_STEPS": 2, "SQUEEZE_EVERY": 1, "SQUEEZE_BATCH": 2},
    }.items():
        monkeypatch.setattr(run, name, x)
    drawn = []
    monkeypatch.setattr(picture, "plot", lambda *args: drawn.append(args))
    told = tmp_path / "dynamics.json"
    arguments = ["--work", str(tmp_path / "work"), "--json", str(told)]
    assert run.main([*arguments, "--only", "statistics"]) is None
    assert "missing: head" in capsys.readouterr().out
    found = run.main(arguments)
    assert found is not None
    assert "statistics: there already" in capsys.readouterr().out
    assert report.render(json.loads(told.read_text())) == report.render(found)
    assert "| kindness |" in report.render(found)
    assert "Spearman" in report.summary(found)
    assert all(row["off"] < 0.1 for row in [found["head"]["1"]])
    monkeypatch.undo()
    (args,) = drawn
    picture.plot(*args[:-1], tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")
