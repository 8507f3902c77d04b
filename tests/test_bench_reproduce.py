"""The reproductions: their prompts, the bounds in their table, and how they are resumed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import crossfade as cf
import numpy as np
import pytest
import torch
from crossfade import models, training

pytest.importorskip("trl")  # TRL needs Python 3.11
pytest.importorskip("textstat")
pytest.importorskip("wordfreq")
sys.path += [
    str(Path(__file__).parent.parent / "bench" / "reproduce"),
]

import ivg
import make_guides
import metaaligner
import reviews
from reports import ivg as report
from tiny_models import make, make_tokenizer


def test_nothing_held_out_was_trained_on() -> None:
    for trained, held_out in zip(reviews.TRAINED, reviews.HELD_OUT, strict=True):
        assert not set(trained) & set(held_out)
    prompts = [p[0]["content"] for p in reviews.prompts(reviews.HELD_OUT)]
    assert len(set(prompts)) == len(prompts) >= 200
    subjects = reviews.HELD_OUT[0]
    first = {s for s in subjects for p in prompts[: len(subjects)] if f"movie, {s} " in p}
    assert first == set(subjects), "they are mixed"


def test_the_divergence_of_choosing_is_bounded() -> None:
    """For best of n the bound is what n of many equally likely texts, none alike, come to."""
    n, many = 4, 100_000
    rank = np.arange(many)
    chosen = ((many - rank) / many) ** n - ((many - rank - 1) / many) ** n
    exact = float((chosen * np.log(chosen * many)).sum())
    value = cf.Reward(lambda prompts, texts: [0.0] * len(texts))
    assert ivg.choice_kl(cf.BestOfN(n, value), 40) == pytest.approx(exact, abs=1e-3)
    assert ivg.choice_kl(None, 40) == 0
    search = cf.ChunkBeamSearch(2, 4, 5, value)
    for length, chunks in ((1, 1), (5, 1), (6, 2), (40, 8)):
        most = math.log(8) + (chunks - 1) * math.log(4)
        assert ivg.choice_kl(search, length) == pytest.approx(most)


def test_eft_at_a_divergence() -> None:
    points = [
        ("both", "base", 0.0, 0.2),
        ("sentiment", "EFT, beta = 1", 2.0, 0.6),
        ("sentiment", "IVG", 1.0, 0.9),
    ]
    rows = [{"objective": o, "method": m, "kl": kl, "sentiment": r} for o, m, kl, r in points]
    assert report.at_kl(rows, "sentiment", 1.0) == pytest.approx(0.4)
    assert report.at_kl(rows, "sentiment", 2.5) is None
    assert report.at_kl([rows[0], rows[2]], "sentiment", 1.0) is None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guides that the recipe makes for a tiny model, from a few words and subjects."""
    folder = tmp_path_factory.mktemp("guides") / "work"
    tokenizer = make_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "smollm2", lambda *_: (make("gemma3"), tokenizer))
        patch.setattr(reviews, "TRAINED", (("a film", "the plot"), ("a cast", "the cast")))
        patch.setattr(make_guides, "VALUE_EPOCHS", 2)
        patch.setattr(make_guides, "BATCH", 2)
        small = {"SAMPLES": 4, "NEW": 4, "BATCH": 2, "MARGIN": 1.0}
        counts = {"COUNTS": {"warm-up": 2, "equal": 2, "better": 4}}
        lora = {"LORA": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}}
        for name, x in {**small, **counts, **lora}.items():
            patch.setattr(metaaligner, name, x)
        make_guides.main(["--work", str(folder)])
        yield folder


def test_the_recipe_makes_what_ships_and_goes_on(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [f"{reward}{kind}" for reward in reviews.REWARDS for kind in ("", "_direct", "_value")]
    made.append("aligner")
    assert sorted(p.name for p in work.iterdir()) == sorted([*made, "rollouts.jsonl"])
    rows = (work / "rollouts.jsonl").read_text()
    before = {p: p.stat().st_mtime_ns for p in work.glob("*/*.safetensors")}
    assert len(before) == len(made)

    (work / "sentiment_value" / "log.json").unlink()
    capsys.readouterr()
    make_guides.main(["--work", str(work)])
    said = capsys.readouterr().out
    assert said.count("there already") == len(made) - 1
    assert (work / "rollouts.jsonl").read_text() == rows, "nothing was sampled anew"
    changed = {p.parent.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed == {"sentiment_value"}

    model, tokenizer = models.smollm2()
    training.load_value_head(work / "sentiment_value", model)
    wrapped = models.with_adapters(model, {r: work / r for r in reviews.REWARDS})
    base = cf.Model(wrapped, tokenizer=tokenizer, adapter=None)
    guide = cf.Model(wrapped, tokenizer=tokenizer, adapter="brevity")
    text = [[{"role": "user", "content": "the film"}]]
    moved = [cf.score(m, text, [[8, 9, 10]]).logprobs for m in (base, guide)]
    assert not torch.equal(*moved), "it learned"


def test_what_is_installed_is_what_ships(work: Path, tmp_path: Path) -> None:
    make_guides.install(work, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(models.GUIDES)
    assert len([*(tmp_path / "aligner").iterdir()]) == 2, "nothing of its training"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU")
def test_a_run_of_the_table_goes_on_where_it_was(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ivg, "BETAS", (1.0,))
    monkeypatch.setattr(ivg, "FADER", (0.5,))
    monkeypatch.setattr(ivg, "NEW", 4)
    path = tmp_path / "ivg.json"
    arguments = ["--work", str(work), "--prompts", "2", "--json", str(path)]
    first = ivg.main(arguments)
    methods = [(r["objective"], r["method"]) for r in first["rows"]]
    assert len(methods) == len(set(methods)) == 1 + 2 * 7 + 1
    assert all(math.isfinite(r["sentiment"]) and r["perplexity"] > 1 for r in first["rows"])
    assert first["rows"][0]["kl"] == pytest.approx(0, abs=1e-4), "the base does not leave itself"
    assert path.with_suffix(".png").stat().st_size > 10_000
    path.write_text(json.dumps({**first, "rows": first["rows"][1:]}))
    again = ivg.main(arguments)
    assert [r["texts"] for r in again["rows"][:-1]] == [r["texts"] for r in first["rows"][1:]]
    assert again["rows"][-1]["texts"] == first["rows"][0]["texts"], "the one that was missing"
    assert "| sentiment | IVG |" in ivg.render(again)
    with pytest.raises(SystemExit):
        ivg.main(["--prompts", "1", "--json", str(path)])
