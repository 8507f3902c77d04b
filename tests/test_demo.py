"""The demo: its figures are those of the library, and an interrupt shows what is finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import cli, demo, metrics, models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMALL = demo.Settings(weights=(-1.0, 0.0, 2.0), samples=2, max_new_tokens=5)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """A random model whose words are those of the demo's own prompts."""
    prompts = f"{demo.NEUTRAL} {demo.ENTHUSIASTIC} {demo.BITTER} {demo.QUESTION}"
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys([*prompts.split(), "wonderful", "awful"])]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model, tokenizer


@pytest.fixture(scope="module")
def found(tiny: tuple[Any, Any]) -> list[demo.Position]:
    return list(demo.positions(*tiny, SMALL))


def test_figures_are_those_of_the_library(tiny, found: list[demo.Position]) -> None:
    neutral, enthusiastic, bitter = demo.terms(*tiny)
    prompts = [demo.QUESTION.format(movie) for movie in demo.MOVIES]
    out = cf.generate(
        neutral - 1.0 * (enthusiastic - bitter),
        prompts,
        num_return_sequences=2,
        max_new_tokens=5,
        do_sample=True,
        temperature=0.7,
        seed=0,
        return_kl_to_base=True,
    )
    scores = cf.score(neutral, [p for p in prompts for _ in range(2)], out.responses)
    p = found[0]
    assert p.weight == -1.0
    assert [t.rstrip("…") for t in p.texts] == [t.strip() for t in out.text]
    assert p.tokens == int(out.lengths.sum())
    # the base's perplexity comes with the decoding; scoring the texts afterwards gives the same
    expected = metrics.perplexity(float(scores.totals.sum()), int(scores.lengths.sum()))
    assert p.perplexity == pytest.approx(expected, rel=1e-4)
    kl = (out.kl_to_base.sum(dim=1) / out.lengths).tolist()
    assert (p.kl, p.kl_interval) == pytest.approx(metrics.mean_interval(kl))
    rewards = metrics.sentiment(p.texts)
    assert (p.reward, p.reward_interval) == pytest.approx(metrics.mean_interval(rewards))
    assert p.distinct_2 == metrics.distinct_n(p.texts, 2)


def test_at_weight_zero_the_blend_is_the_neutral_term(found: list[demo.Position]) -> None:
    assert found[1].kl == pytest.approx(0.0, abs=1e-6)
    assert min(found[0].kl, found[2].kl) > 1e-3


def test_a_seed_gives_the_same_texts_again(tiny, found: list[demo.Position]) -> None:
    again = list(demo.positions(*tiny, SMALL))
    assert [p.texts for p in again] == [p.texts for p in found]
    other = list(demo.positions(*tiny, replace(SMALL, seed=1)))
    assert [p.texts for p in other] != [p.texts for p in found]


def test_the_table_and_the_texts_show_every_position(found: list[demo.Position]) -> None:
    table = demo.table(found)
    for p in found:
        assert f"{p.weight:+6.2f}   {p.reward:+.2f} ± {p.reward_interval:.2f}" in table
    texts = demo.side_by_side(found)
    assert all(f"w = {p.weight:g}" in texts for p in found)
    assert all(movie in texts for movie in demo.MOVIES[:2])
    assert max(map(len, texts.splitlines())) <= 110


@pytest.fixture
def tiny_demo(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's arguments, with the tiny model in place of the real one."""
    monkeypatch.setattr(models, "smollm2", lambda device: tiny)
    return ["demo", "--weights", "-1", "1", "--samples=1", "--max-new-tokens=3", "--output"]


def test_the_command_prints_and_plots(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    assert cli.main([*tiny_demo, str(plot)]) == 0
    out = capsys.readouterr().out
    assert demo.FORMULA in out
    assert f"plot: {plot}" in out
    data = plot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000  # more than an empty page


def test_json_has_the_figures_and_the_settings(
    tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["weights"] == [-1.0, 1.0]
    assert [p["weight"] for p in found["positions"]] == [-1.0, 1.0]
    assert {"reward", "reward_interval", "kl", "perplexity", "distinct_2", "texts"} <= set(
        found["positions"][0]
    )


def test_an_interrupt_shows_what_is_finished(
    tiny_demo: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = demo.measure

    def interrupted(blend: cf.Blend, weight: float, *rest: Any) -> demo.Position:
        if weight > 0:
            raise KeyboardInterrupt
        return measure(blend, weight, *rest)

    monkeypatch.setattr(demo, "measure", interrupted)
    assert cli.main([*tiny_demo, str(tmp_path / "plot.png")]) == 130
    out, err = capsys.readouterr()
    assert "w = -1" in out
    assert "w = 1" not in out
    assert "interrupted after 1 of 2 positions" in err
    assert (tmp_path / "plot.png").exists()


@pytest.mark.model
def test_the_fader_moves_the_real_model() -> None:
    try:
        model, tokenizer = models.smollm2()
    except (OSError, ImportError) as error:
        pytest.skip(f"the small model cannot be had: {error}")
    settings = demo.Settings(weights=(-1.5, 1.5), samples=2, max_new_tokens=16)
    bitter, enthusiastic = demo.positions(model, tokenizer, settings)
    assert enthusiastic.reward - bitter.reward > 0.3
    assert min(bitter.kl, enthusiastic.kl) > 0.02
    assert max(bitter.perplexity, enthusiastic.perplexity) < 50  # still text that it could write
