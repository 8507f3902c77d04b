"""The bench of the evaluation harness, over a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizer_kinds import tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval", reason='it needs "crossfade[lm-eval]"')

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import lm_eval_speed


def tiny() -> tuple[LlamaForCausalLM, object]:
    torch.manual_seed(0)
    tokenizer = tokenizer_of("bytes")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_both_answer_alike_and_the_figures_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crossfade.models.smollm2", tiny)
    file = tmp_path / "lm_eval.json"
    argv = ["lm_eval_speed.py", "--questions=2", "--words=4", "--new=3", "--rounds=2"]
    monkeypatch.setattr(sys, "argv", [*argv, f"--json={file}"])
    lm_eval_speed.main()
    found = json.loads(file.read_text())
    assert "| texts | 2 |" in capsys.readouterr().out
    assert [case["requests"] for case in found["cases"].values()] == [8, 8, 8, 8, 2]
    assert all(len(case["ratios"]) == 2 for case in found["cases"].values())


@pytest.mark.parametrize("wrong", [(-1.5, True), (-1.0, False)])
def test_other_answers_are_noticed(wrong: tuple[float, bool]) -> None:
    assert lm_eval_speed.disagree(wrong, (-1.0, True))
    assert not lm_eval_speed.disagree((-1.0001, True), (-1.0, True))
    assert lm_eval_speed.disagree("yes", "no")
