"""``crossfade demo``: its figures are the library's, and an interrupt shows what is finished."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import crossfade as cf
import peft
import pytest
from crossfade import cli, metrics, models
from crossfade.cli import fader, fader_report
from word_models import make_tokenizer, random_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
REVIEWS = ("wonderful", "awful")
GUIDE = models.guide  # the tests put tiny adapters in its place
SMALL = fader.Settings(weights=(0.0, 0.5, 1.5), samples=2, max_new_tokens=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A tiny random model whose words are those of the demo's prompts, and two guides for it."""
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(fader.QUESTION.split()), *REVIEWS]
    tokenizer = make_tokenizer(words, "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    model = random_model(words)
    folder = tmp_path_factory.mktemp("guides")
    for name in fader.GUIDES:
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "guide", lambda name: folder / name)
        yield model, tokenizer


@pytest.fixture(scope="module")
def found(tiny: tuple[Any, Any]) -> list[fader.Position]:
    return positions(tiny)


def positions(tiny: tuple[Any, Any], settings: fader.Settings = SMALL) -> list[fader.Position]:
    model, tokenizer = tiny
    return list(fader.positions(copy.deepcopy(model), tokenizer, settings))  # adapters change it


def test_figures_are_those_of_the_library(tiny, found: list[fader.Position]) -> None:
    base, sentiment, brevity = fader.terms(copy.deepcopy(tiny[0]), tiny[1])
    prompts = fader.chats()
    out = cf.generate(
        base + 0.5 * (sentiment - base) + 0.5 * (brevity - base),
        prompts,
        num_return_sequences=2,
        max_new_tokens=5,
        do_sample=True,
        temperature=0.7,
        seed=0,
        return_kl_to_base=True,
    )
    scores = cf.score(base, [p for p in prompts for _ in range(2)], out.responses)
    p = found[1]
    assert p.weight == 0.5
    assert [t.rstrip("…") for t in p.texts] == [t.strip() for t in out.text]
    assert p.tokens == int(out.lengths.sum())
    # The demo takes the perplexity from the decoding; scoring the texts gives the same.
    expected = metrics.perplexity(float(scores.totals.sum()), int(scores.lengths.sum()))
    assert p.perplexity == pytest.approx(expected, rel=1e-4)
    kl = (out.kl_to_base.sum(dim=1) / out.lengths).tolist()
    assert (p.kl, p.kl_interval) == pytest.approx(metrics.mean_interval(kl))
    sentiments = metrics.mean_interval(metrics.sentiment(p.texts))
    assert (p.sentiment, p.sentiment_interval) == pytest.approx(sentiments)
    words = metrics.mean_interval([len(t.split()) for t in p.texts])
    assert (p.words, p.words_interval) == pytest.approx(words)
    assert p.distinct_2 == metrics.distinct_n(p.texts, 2)


def test_the_ends_are_the_guides(tiny, found: list[fader.Position]) -> None:
    base, sentiment, brevity = fader.terms(copy.deepcopy(tiny[0]), tiny[1])
    for w, guide in ((0.0, sentiment), (1.0, brevity)):
        blend = fader.fade(base, sentiment, brevity, w)
        assert (blend.terms, blend.weights) == ((base, guide), (0.0, 1.0))
    assert min(p.kl for p in found) > 1e-3


def test_a_seed_gives_the_same_texts_again(tiny, found: list[fader.Position]) -> None:
    again = positions(tiny)
    assert [p.texts for p in again] == [p.texts for p in found]
    other = positions(tiny, replace(SMALL, seed=1))
    assert [p.texts for p in other] != [p.texts for p in found]


def test_the_table_and_the_texts_show_every_position(found: list[fader.Position]) -> None:
    table = fader_report.table(found)
    for p in found:
        assert f"{p.weight:+6.2f}     {p.sentiment:+.2f} ± {p.sentiment_interval:.2f}" in table
        assert f"{p.words:5.1f} ± {p.words_interval:3.1f}" in table
    texts = fader_report.side_by_side(found)
    assert all(f"w = {p.weight:g}" in texts for p in found)
    assert all(movie in texts for movie in fader.MOVIES[:2])
    assert max(map(len, texts.splitlines())) <= 110


@pytest.fixture
def tiny_demo(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a demo that runs the tiny model in place of the real one."""
    monkeypatch.setattr(models, "smollm2", lambda device: copy.deepcopy(tiny))
    return ["demo", "--weights", "0", "1", "--samples=1", "--max-new-tokens=3", "--output"]


def test_the_command_prints_and_plots(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    assert cli.main([*tiny_demo, str(plot)]) == 0
    out = capsys.readouterr().out
    assert fader.FORMULA in out
    assert f"plot: {plot}" in out
    data = plot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000  # more than an empty page


def test_json_has_the_figures_and_the_settings(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["weights"] == [0.0, 1.0]
    assert [p["weight"] for p in found["positions"]] == [0.0, 1.0]
    assert {"sentiment", "words", "words_interval", "kl", "perplexity", "texts"} <= set(
        found["positions"][0]
    )


def test_an_interrupt_shows_what_is_finished(
    tiny_demo: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = fader.measure

    def interrupted(blend: cf.Blend, weight: float, *rest: Any) -> fader.Position:
        if weight > 0:
            raise KeyboardInterrupt
        return measure(blend, weight, *rest)

    monkeypatch.setattr(fader, "measure", interrupted)
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png")]) == 130
    out, err = capsys.readouterr()
    assert "w = 0" in out
    assert "w = 1" not in out
    assert "interrupted after 1 of 2 positions" in err
    assert (tmp_path / "plot.png").exists()


@pytest.mark.model
def test_the_fader_moves_the_real_model(
    smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "guide", GUIDE)
    model, tokenizer = models.load(smollm2_folder)
    monkeypatch.setattr(fader, "MOVIES", fader.MOVIES[:4])
    settings = fader.Settings(weights=(0.0, 0.75), samples=2, max_new_tokens=16)
    praise, brief = fader.positions(model, tokenizer, settings)
    assert praise.sentiment - brief.sentiment > 0.2
    assert praise.words - brief.words > 3
    assert min(praise.kl, brief.kl) > 0.02
    assert max(praise.perplexity, brief.perplexity) < 50  # still text that it could write
