"""``crossfade demo``: its figures are the library's, and an interrupt shows what is finished."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli, metrics, models
from crossfade.cli import fader, fader_report
from word_models import make_tokenizer, random_model

WORDS = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(" ".join(fader.MOODS.values()).split())]
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
SMALL = fader.Settings(weights=(-2.0, 1.5), samples=2, max_new_tokens=5)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """A tiny random model whose words are those of the moods."""
    return random_model(WORDS), make_tokenizer(WORDS, TEMPLATE)


@pytest.fixture(scope="module")
def found(tiny: tuple[Any, Any]) -> list[fader.Position]:
    """In the order of the weights, as the command has them."""
    return sorted(positions(tiny), key=lambda p: p.weight)


def positions(tiny: tuple[Any, Any], settings: fader.Settings = SMALL) -> list[fader.Position]:
    return list(fader.positions(*tiny, settings, lambda: None))


def test_figures_are_those_of_the_library(tiny, found: list[fader.Position]) -> None:
    base, cheerful, gloomy = fader.terms(*tiny)
    prompts = [[{"role": "user", "content": prompt}] for prompt in fader.PROMPTS]
    out = cf.generate(
        base + 1.5 * cheerful - 1.5 * gloomy,
        prompts,
        num_return_sequences=2,
        max_new_tokens=5,
        do_sample=True,
        temperature=0.5,
        seed=0,
        return_kl_to_base=True,
    )
    scores = cf.score(base, [p for p in prompts for _ in range(2)], out.responses)
    p = found[-1]
    assert p.weight == 1.5
    assert [t.rstrip("…") for t in p.texts] == [t.strip() for t in out.text]
    assert p.tokens == int(out.lengths.sum())
    # The demo takes the perplexity from the decoding; scoring the texts gives the same.
    expected = metrics.perplexity_interval(scores.totals.tolist(), scores.lengths.tolist())
    assert (p.perplexity, p.perplexity_interval) == pytest.approx(expected, rel=1e-4)
    kl = (out.kl_to_base.sum(dim=1) / out.lengths).tolist()
    assert (p.kl, p.kl_interval) == pytest.approx(metrics.mean_interval(kl))
    sentiments = metrics.mean_interval(metrics.sentiment(p.texts))
    assert (p.sentiment, p.sentiment_interval) == pytest.approx(sentiments)
    words = metrics.mean_interval([len(t.split()) for t in p.texts])
    assert (p.words, p.words_interval) == pytest.approx(words)
    assert p.distinct_2 == metrics.distinct_n(p.texts, 2)


def test_the_base_is_always_a_position_and_the_first(tiny) -> None:
    first, *others = positions(tiny)
    assert [first.weight, *(p.weight for p in others)] == [0.0, -2.0, 1.5]
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert min(p.kl for p in others) > 1e-4
    base = fader.terms(*tiny)[0]
    out = cf.generate(
        base,
        [[{"role": "user", "content": prompt}] for prompt in fader.PROMPTS],
        num_return_sequences=2,
        max_new_tokens=5,
        do_sample=True,
        temperature=0.5,
        seed=0,
    )
    assert [t.rstrip("…") for t in first.texts] == [t.strip() for t in out.text]
    assert replace(SMALL, weights=(1.0, 0.0, -0.0, 1.0)).positions == (0.0, 1.0)


def test_the_formula_is_what_is_decoded(tiny) -> None:
    base, cheerful, gloomy = fader.terms(*tiny)
    formula = fader.FORMULA.replace("w", "0.5")
    parsed = cf.parse(formula, base=base, cheerful=cheerful, gloomy=gloomy)
    blend = fader.fade(base, cheerful, gloomy, 0.5)
    assert (blend.terms, blend.weights) == (parsed.terms, parsed.weights)
    assert [t.system for t in blend.terms] == [None, *fader.MOODS.values()]


def test_a_seed_gives_the_same_texts_again(tiny) -> None:
    first, again, other = (positions(tiny, replace(SMALL, seed=seed)) for seed in (0, 0, 1))
    assert [p.texts for p in again] == [p.texts for p in first]
    assert [p.texts for p in other] != [p.texts for p in first]


def test_the_table_and_the_texts_show_every_position(found: list[fader.Position]) -> None:
    table = fader_report.table(found).splitlines()
    for row, p in zip(table[1:], found, strict=True):
        assert row.startswith(fader_report.name(p.weight))
        assert f"{p.sentiment:+.2f} ± {p.sentiment_interval:.2f}" in row
        assert f"{p.words:.1f} ± {p.words_interval:.1f}" in row
        assert f"{p.perplexity:.1f} ± {p.perplexity_interval:.1f}" in row
        assert row.endswith(f"{p.distinct_2:.2f}")
    for width in (80, 110):
        texts = fader_report.side_by_side(found, SMALL, width)
        assert all(fader_report.name(p.weight) in texts.splitlines()[0] for p in found)
        assert all(prompt in texts for prompt in fader.PROMPTS[:2])
        assert max(map(len, texts.splitlines())) <= width


def test_a_figure_of_one_text_has_no_interval(tiny) -> None:
    settings = replace(SMALL, samples=1, prompts=("love it",))
    printed = fader_report.results(positions(tiny, settings), settings)
    assert "±" not in printed.partition("These are")[0]
    assert "nan" not in printed
    report = json.dumps(fader_report.report(positions(tiny, settings), settings), allow_nan=False)
    assert json.loads(report)["positions"][0]["words_interval"] is None


def test_every_column_is_explained(found: list[fader.Position]) -> None:
    printed = fader_report.results(found, SMALL, width=80)
    for column in fader_report.TABLE.split():
        assert re.search(rf"^{column} +[A-Z]", printed, re.MULTILINE)
    plan = fader_report.plan(SMALL)
    for name in re.findall(r"[a-z]{2,}", fader.FORMULA):
        assert re.search(rf"^{name} +the model", plan, re.MULTILINE)
    assert max(map(len, f"{plan}\n{printed}".splitlines())) <= 80


def test_labels_lie_within_the_picture_and_name_the_base(
    found: list[fader.Position], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    settings = replace(SMALL, prompts=("a prompt of one's own " * 20,))
    fader_report.plot(found, settings, tmp_path / "plot.png")
    (figure,) = kept
    page = figure.bbox
    for axes in figure.axes:
        texts = [t.get_text() for t in axes.texts]
        assert "base's own" in texts
        labels = [axes.xaxis.label, axes.yaxis.label, *axes.texts, *figure.texts]
        for label in labels:
            box = label.get_window_extent()
            assert page.x0 <= box.x0
            assert box.x1 <= page.x1
        height, beside = axes.yaxis.label.get_window_extent(), axes.get_window_extent()
        points = axes.transData.transform([(p.weight, 0) for p in found])
        assert min(t.get_window_extent().x0 for t in axes.texts) > points[:, 0].max()
        assert beside.y0 <= height.y0
        assert height.y1 <= beside.y1  # the label of one panel does not reach into another
    assert len(figure.axes) == 2


@pytest.fixture
def tiny_demo(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a demo that runs the tiny model in place of the real one."""
    monkeypatch.setattr(models, "smollm2", lambda device: tiny)
    return ["demo", "--weights", "-1", "1", "--samples=1", "--max-new-tokens=3", "--output"]


def test_the_command_prints_and_plots(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    assert cli.main([*tiny_demo, str(plot)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    # The plan, the first prompt and the base's answer come before what the fader does.
    starts = [
        fader.FORMULA,
        f"prompt    {fader.PROMPTS[0]}\nbase      ",
        "w = -1 (gloomy)",
        "mood ",
    ]
    places = [out.index(text) for text in starts]
    assert places == sorted(places)
    assert f"plot: {plot}" in out
    data = plot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000  # more than an empty page


def test_prompts_of_ones_own(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--prompt=praise it", "--prompt=hate it"]
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png"), *own]) == 0
    out = capsys.readouterr().out
    assert "-- praise it" in out
    assert "-- hate it" in out
    assert "These are 2 texts to 2 prompts" in out
    assert fader.PROMPTS[0] not in out


def test_one_prompt_shows_several_answers(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_demo.remove("--samples=1")
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png"), "--prompt=praise it"]) == 0
    out = capsys.readouterr().out
    assert "-- the same, drawn anew" in out
    assert "These are 16 texts to one prompt" in out


def test_json_has_the_figures_and_the_settings(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["formula"] == fader.FORMULA
    assert found["moods"] == fader.MOODS
    assert found["settings"]["weights"] == [-1.0, 1.0]
    assert found["settings"]["prompts"] == list(fader.PROMPTS)
    assert [p["weight"] for p in found["positions"]] == [-1.0, 0.0, 1.0]
    assert {"sentiment", "words", "perplexity_interval", "kl", "distinct_2", "texts"} <= set(
        found["positions"][0]
    )


class Terminal(io.StringIO):
    """A stream that says that a person is watching, and keeps what is written with the others."""

    def __init__(self, written: list[str]) -> None:
        super().__init__()
        self.written = written

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)


def test_output_shares_no_line_with_the_bar(
    tiny_demo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Terminal(written))
    monkeypatch.setattr("crossfade.progress.DELAY", 0.0)
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png")]) == 0
    screen = shown("".join(written))
    bars = [line for line in screen if "%|" in line]
    assert "step/s]" in "".join(written).partition("prompt ")[0]  # a bar was there to be shared
    assert all(re.fullmatch(r" *\d+%\|.*step/s\]", bar) for bar in bars)
    assert f"prompt    {fader.PROMPTS[0]}" in screen


def shown(written: str) -> list[str]:
    """The lines of a screen: "\\r" goes back to the start of a line, which is then overwritten."""
    lines: list[list[str]] = [[]]
    column = 0
    for character in written:
        if character in "\r\n":
            column = 0
            if character == "\n":
                lines.append([])
        else:
            lines[-1][column : column + 1] = character
            column += 1
    return ["".join(line).rstrip() for line in lines]


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
    assert "w = -1 (gloomy)" in out
    assert "w = 1 (cheerful)" not in out
    assert "interrupted after 2 of 3 positions" in err
    assert (tmp_path / "plot.png").exists()


@pytest.mark.model
def test_the_fader_moves_the_real_model(
    smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = models.load(smollm2_folder)
    settings = fader.Settings(
        weights=(-2.0, 2.0), samples=1, max_new_tokens=16, seed=1, prompts=fader.PROMPTS[:3]
    )
    base, gloomy, cheerful = fader.positions(model, tokenizer, settings, lambda: None)
    assert cheerful.sentiment - gloomy.sentiment > 0.4
    assert gloomy.sentiment < base.sentiment
    assert min(gloomy.kl, cheerful.kl) > 0.02
    assert max(gloomy.perplexity, cheerful.perplexity) < 2.5 * base.perplexity
